"""Held-out loss of a hybrid by position for several bases of the scale on its attention's logits.

    python scripts/choose_scale.py smollm2-135m-sala --heldout corpus/heldout.jsonl --bases none,2000,1000,500

With a base a (`attn_scale_base`, HypeNet) the logits of the sparse layers at position t grow by
log(t + a) / log(a). It is chosen after training, on text that no weight was fitted to: the longest held-out
document of each kind that has enough tokens, read once for each length. The file has a line for each
document: {"text": ..., "group": ...}. Rows, one for each base and length, go to benchmarks/scale.csv.
"""

import time
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer

from opensala import MiniCPMSALAForCausalLM
from opensala.bench.record import append_rows
from opensala.cli.sizes import token_count
from opensala.data.heldout import texts_by_group
from opensala.hub import checkpoint_folder

ROWS = Path(__file__).parents[1] / "benchmarks" / "scale.csv"
SKIPPED = 100  # tokens at a document's beginning: titles, licences
QUARTERS = 4


def windows(tokenizer: Any, heldout: Path, length: int) -> list[list[int]]:
    """So many tokens of the longest document of each kind, if it has them."""
    found = []
    for text in (max(texts, key=len) for texts in texts_by_group(heldout).values()):
        ids = tokenizer(text[: 8 * (length + SKIPPED)], add_special_tokens=False)["input_ids"]
        if len(ids) >= length + SKIPPED:
            found.append(ids[SKIPPED : SKIPPED + length])
    if not found:
        raise typer.BadParameter(
            f"no document of {heldout} has {length + SKIPPED:,} tokens: take shorter --lengths"
        )
    return found


@torch.inference_mode()
def losses(model: MiniCPMSALAForCausalLM, window: list[int]) -> list[float]:
    """Mean loss of each quarter of a text, in nats a token."""
    ids = torch.tensor([window])
    logits = model(input_ids=ids).logits[0, :-1].float()
    each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    return [part.mean().item() for part in each.chunk(QUARTERS)]


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or name of a pulled hybrid.")],
    heldout: Annotated[Path, typer.Option(help="JSON lines of held-out documents: text, group.")],
    bases: Annotated[str, typer.Option(help="Numbers above 1, or none for no scale.")] = "none,2000,1000,500",
    lengths: Annotated[str, typer.Option(help="Tokens of the texts.")] = "2K,8K",
    rows: Annotated[Path, typer.Option(help="Rows are added here.")] = ROWS,
) -> None:
    torch.set_flush_denormal(True)
    folder = checkpoint_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for length in (token_count(part, "--lengths") for part in lengths.split(",")):
        texts = windows(tokenizer, heldout, length)
        for base in bases.split(","):
            hybrid = MiniCPMSALAForCausalLM.from_pretrained(
                folder, attn_scale_base=None if base == "none" else float(base), dtype=torch.float32
            ).eval()
            quarters = [mean(part) for part in zip(*(losses(hybrid, text) for text in texts), strict=True)]
            row = {"model": model, "base": base, "tokens": length, "texts": len(texts)}
            row |= {f"loss, quarter {n}": round(loss, 4) for n, loss in enumerate(quarters, 1)}
            row |= {"loss": round(mean(quarters), 4), "date": time.strftime("%Y-%m-%d")}
            append_rows(rows, list(row), [row])
            print(row, flush=True)


if __name__ == "__main__":
    typer.run(main)
