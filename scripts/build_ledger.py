"""Make docs/gpu.md from the block lists, the rows measured on GPUs, and the counts.

python scripts/build_ledger.py            write the page
python scripts/build_ledger.py --lists    count the block lists of the shipped model first (a minute on a CPU)
"""

import csv
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

from opensala.bench import counts  # noqa: E402
from opensala.bench.gpu.ledger import LISTS, PAGE, page, read_rows, read_sharing  # noqa: E402
from opensala.data.text import long_document  # noqa: E402
from opensala.engine import load_engine  # noqa: E402
from opensala.model import attention  # noqa: E402


@torch.no_grad()
def count_lists(tokens: int, seed: int = 0) -> list[dict[str, object]]:
    """Sharing of far blocks in each sparse layer of the shipped model, on source code of so many tokens."""
    engine = load_engine(device="cpu", attention_mode="sparse")
    ids = engine.encode(long_document(8 * tokens, seed=seed))[:tokens]
    lists: list[torch.Tensor] = []
    select = attention.select_blocks_paged

    def keep(*args: Any, **options: Any) -> torch.Tensor:
        lists.append(select(*args, **options))
        return lists[-1]

    attention.select_blocks_paged = keep
    engine.model(torch.tensor([ids]), logits_to_keep=1, use_cache=False)
    attention.select_blocks_paged = select
    layers = [i for i in range(engine.config.num_hidden_layers) if engine.config.is_sparse(i)]
    rows: list[dict[str, object]] = []
    for layer, blocks in zip(layers, lists, strict=True):
        spec = engine.config.block_spec
        found = counts.sharing(blocks, spec)
        position = torch.arange(len(blocks))[:, None, None]
        far = (blocks >= 0) & (blocks < position // spec.block_size - spec.window_blocks)
        rows.append(
            {
                "layer": layer,
                "tokens": len(ids),
                "tile": found.tile,
                "far_pairs": int(far.sum()),
                "shared": f"{found.shared:.4f}",
                "users": f"{found.users:.3f}",
            }
        )
    return rows


def main(
    lists: Annotated[bool, typer.Option("--lists", help="Count the block lists first.")] = False,
    tokens: Annotated[int, typer.Option(min=4096, help="Length of the text for them.")] = 32768,
) -> None:
    if lists:
        rows = count_lists(tokens)
        with LISTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    PAGE.write_text(page(read_sharing(), read_rows()))
    print(PAGE)


if __name__ == "__main__":
    typer.run(main)
