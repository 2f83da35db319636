"""Strict loading of checkpoints: safetensors only, and every tensor that does not fit is named.

It works through transformers' own loader, so that sharded, hub and quantised checkpoints load as usual.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

logger = logging.getLogger("opensala")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NAMED = 20  # problems written out before "and n more"


def check_files(folder: Path) -> None:
    """Refuse a local checkpoint folder without readable safetensors, saying what is wrong with it."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: it is not a checkpoint folder")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [p.name for pattern in _PICKLES for p in folder.glob(pattern)]
        found = (
            f" {pickles[0]} is a pickle, which can run code when opened and is never read;" if pickles else ""
        )
        raise ValueError(
            f"{folder} holds no *.safetensors file;{found} save the model with safe_serialization"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} cannot be read as safetensors ({error}); copy or download it again"
            ) from error


def load_strictly(load: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    """Call transformers' `from_pretrained` and refuse a checkpoint that does not fit tensor for tensor."""
    if kwargs.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors=False: pickled checkpoints can run code when opened and are never read"
        )
    kwargs["use_safetensors"] = True
    if Path(str(path)).is_dir():
        check_files(Path(str(path)) / kwargs.get("subfolder", ""))
    wants_info = kwargs.pop("output_loading_info", False)
    tolerated = kwargs.pop("ignore_mismatched_sizes", False)
    model, info = load(path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
    problems += [f"unexpected {name}" for name in sorted(info["unexpected_keys"])]
    if not tolerated:
        problems += [
            f"{name} has shape {list(there)}, the configuration asks for {list(here)}"
            for name, there, here in sorted(info["mismatched_keys"])
        ]
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ValueError(f"{path} does not fit its configuration: {'; '.join(problems[:_NAMED])}{more}")
    return (model, info) if wants_info else model
