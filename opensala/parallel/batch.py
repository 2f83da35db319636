"""From a batch of whole rows to this rank's stretch of it.

Every rank of a cp group reads the same rows (its dp rank decides which) and keeps its own part. Targets are
shifted first:
the target of a stretch's last token is the first token of the next rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..model.config import check_choice
from ..model.layout import packed_bounds
from .exchange import all_gather
from .mesh import ParallelMesh

IGNORED = -100  # a target without loss, as in transformers
KEYS = ("input_ids", "labels", "targets", "weights", "position_ids", "cu_seqlens")


def shard_sequence(batch: Mapping[str, Tensor], mesh: ParallelMesh) -> dict[str, Tensor]:
    """This rank's part of a batch, on its device; with cp = 1 the whole of it in the same form.

    Args:
        batch: `input_ids` `[B, L]` and, as wanted:
            `labels` `[B, L]`: the token at each place as a target, -100 for none (transformers' convention;
            `input_ids` if absent); or `targets` `[B, L]`, shifted already: what each place is to predict;
            `weights` `[B, L]`: of the token at each place as a target with `labels`, of its prediction with
            `targets`; `cu_seqlens` `[N + 1]`: boundaries of documents packed in one row, or `position_ids`
            `[B, L]` that fall back to 0 at each of them (or are rotary positions, if each row is one
            document).

    Returns:
        `input_ids`, `targets` and `weights` (float32; 0 where there is no target) `[B, L / cp]`,
        `position_ids` (positions in the document) and, for a single row, `cu_seqlens` of the whole row. The
        model takes all but targets and weights.

    Raises:
        ValueError: L that cp does not divide, shapes that do not agree, an unknown key, or ranks of one cp
            group that were given different batches. Sequences are not padded here: pack them to a length that
                cp divides.
    """
    for key in batch:
        check_choice("a key of the batch", key, KEYS)
    ids = batch["input_ids"]
    rows, length = ids.shape
    _check(batch, mesh.cp)
    bounds = _bounds(batch, rows, length)
    targets, weights = _targets(batch)
    whole = {
        "input_ids": ids,
        "targets": targets,
        "weights": weights,
        "position_ids": _positions(batch, rows, length, bounds),
    }
    if mesh.cp > 1:
        _check_same(whole, bounds, mesh)
    part = length // mesh.cp
    here = slice(mesh.cp_rank * part, (mesh.cp_rank + 1) * part)
    sharded = {name: x[:, here].contiguous().to(mesh.device, non_blocking=True) for name, x in whole.items()}
    if bounds is not None:
        sharded["cu_seqlens"] = torch.tensor(bounds)  # stays on the CPU: the layout is made there
    return sharded


def _check(batch: Mapping[str, Tensor], ranks: int) -> None:
    ids = batch["input_ids"]
    if ids.dim() != 2:
        raise ValueError(f"input_ids must be [B, L], got {list(ids.shape)}")
    if ids.shape[1] % ranks:
        raise ValueError(
            f"a sequence of {ids.shape[1]} tokens cannot be split over cp = {ranks} ranks: choose a "
            "length that "
            f"{ranks} divides (the next is {-(-ids.shape[1] // ranks) * ranks}) or another cp"
        )
    for name in ("labels", "targets", "weights", "position_ids"):
        if name in batch and batch[name].shape != ids.shape:
            raise ValueError(
                f"{name} must have input_ids' shape {list(ids.shape)}, got {list(batch[name].shape)}"
            )
    if "labels" in batch and "targets" in batch:
        raise ValueError("give labels (shifted here) or targets (shifted already), not both")


def _bounds(batch: Mapping[str, Tensor], rows: int, length: int) -> list[int] | None:
    cu = batch.get("cu_seqlens")
    if cu is not None and rows != 1:
        raise ValueError(f"cu_seqlens needs a single row, got {rows}: pack the documents into one")
    return packed_bounds(batch.get("position_ids"), cu, length) or ([0, length] if rows == 1 else None)


def _targets(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    ids = batch["input_ids"]
    if "targets" in batch:
        targets, weights = batch["targets"], batch.get("weights")
    else:
        targets, weights = _shift(batch.get("labels", ids), IGNORED), batch.get("weights")
        weights = None if weights is None else _shift(weights, 0)
    present = (targets != IGNORED).float()
    return targets, present if weights is None else present * weights.float()


def _shift(x: Tensor, fill: int) -> Tensor:
    return torch.cat([x[:, 1:], torch.full_like(x[:, :1], fill)], 1)


def _positions(batch: Mapping[str, Tensor], rows: int, length: int, bounds: list[int] | None) -> Tensor:
    if "position_ids" in batch and (bounds is None or len(bounds) == 2):
        return batch["position_ids"]
    bounds = bounds or [0, length]
    starts = [torch.arange(b - a) for a, b in zip(bounds, bounds[1:], strict=False)]
    return torch.cat(starts).expand(rows, length)


def _check_same(whole: Mapping[str, Tensor], bounds: list[int] | None, mesh: ParallelMesh) -> None:
    """Ranks with different rows would train on a sequence that nobody wrote, and say nothing."""
    place = torch.arange(1, whole["input_ids"].shape[1] + 1)
    sums = [(whole[name].cpu().long() * place).sum() for name in ("input_ids", "targets")]
    sums += [torch.tensor(n) for n in (*whole["input_ids"].shape, hash(tuple(bounds or ())) % 2**62)]
    own = torch.stack(sums)[None].to(mesh.device)
    every = own.new_empty(mesh.cp, own.shape[1])
    all_gather(every, own, group=mesh.cp_group)
    if bool((every != own).any()):
        raise ValueError(
            "the ranks of one cp group were given different batches: every rank with the same "
            "mesh.dp_rank must "
            "read the same sequences"
        )
