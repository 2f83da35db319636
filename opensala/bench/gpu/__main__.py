"""One process of the run: `python -m opensala.bench.gpu ...`, started by `scripts/gpu.py`."""

import argparse
import os
import sys
from pathlib import Path

import torch

from .plan import SIZES, groups_of, run
from .steps import SICK


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m opensala.bench.gpu", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the files of the run belong")
    parser.add_argument("--stem", required=True, help="how their names begin")
    parser.add_argument("--rows", type=Path, required=True, help="CSV file that gets the rows")
    parser.add_argument("--only", default="", help="groups of steps, by commas")
    parser.add_argument("--start", type=float, required=True, help="when the run began (Unix time)")
    parser.add_argument("--seconds", type=float, required=True, help="how long it may take")
    parser.add_argument("--sizes", choices=SIZES, default="released", help="how large")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in Triton's interpreter")
    options = parser.parse_args()
    if options.rehearse and os.environ.get("TRITON_INTERPRET") != "1":  # read when kernels are imported
        parser.error("--rehearse needs TRITON_INTERPRET=1")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU here; --rehearse runs the same on the CPU, as the tests do")
    try:
        groups_of(options.only)
    except ValueError as error:
        parser.error(str(error))
    well = run(options)
    sys.exit(0 if well else SICK)


if __name__ == "__main__":
    main()
