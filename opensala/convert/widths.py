"""Matrices in a few bits an entry, and how many bits each of a set gets within a number of bytes.

A group of 64 entries along a row (the whole row, where 64 does not divide it) shares a float16 scale. Below
eight bits the scale is searched: of several, each refined by least squares, the one that comes nearest; its
sign may be negative, so that the largest entry of either sign can be the one level that has no opposite.

Where the second moments of a matrix's inputs are known, columns are rounded one after the other, and those
that follow make up for the error so far in the product with such inputs (GPTQ, arXiv 2210.17323).
"""

import heapq

import torch
from torch import Tensor

GROUP = 64
WIDTHS = (4, 5, 6, 8, 16)  # bits an entry; 16 is bfloat16
_SMALLEST = 2.0**-24  # of float16
_DAMPING = 0.01  # of the mean second moment, added so that all directions can be inverted
_FACTORS = (
    0.7,
    0.78,
    0.84,
    0.9,
    0.95,
    1.0,
    1.06,
)  # of the scale that puts the largest entry on the last level


def group_of(x: Tensor) -> int:
    """Entries that share a scale in a matrix `[out, in]`."""
    return GROUP if x.shape[1] % GROUP == 0 else x.shape[1]


def quantise(x: Tensor, bits: int = 8, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`[out, in]` -> whole numbers and float16 scales `[out, in / 64]` (one a row, if 64 does not divide it).

    Eight bits are int8 `[out, in]`; fewer are packed, uint8 `[out, in * bits / 8]` (8 must divide `in`).

    Args:
        moments: `[in, in]`, mean of the outer products of the matrix's inputs; None rounds each entry alone.
    """
    groups = x.float().unflatten(1, (-1, group_of(x)))
    if bits == 8:
        scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=_SMALLEST).half()
        return (groups / scale.float()).round().clamp(-127, 127).to(torch.int8).flatten(1), scale[..., 0]
    if moments is not None:
        levels, scales = _compensated(x.float(), bits, moments)
        return pack(levels, bits), scales
    scale = _searched(groups, bits, x.new_ones(groups.shape[-1]))
    return pack(_levels(groups, scale.float(), bits).to(torch.int8).flatten(1), bits), scale[..., 0]


def _compensated(x: Tensor, bits: int, moments: Tensor) -> tuple[Tensor, Tensor]:
    """int8 `[out, in]` and scales of `quantise`, each column's error passed on to the columns behind it."""
    size, left = group_of(x), x.clone()
    known = moments.double() + _DAMPING * moments.diagonal().double().mean() * torch.eye(x.shape[1])
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(known)), upper=True).float()
    levels, scales = torch.empty(x.shape, dtype=torch.int8), []
    for start in range(0, x.shape[1], size):
        group = slice(start, start + size)
        scale = _searched(left[:, group], bits, known.diagonal()[group].float())
        scales.append(scale)
        for n in range(start, start + size):
            own = _levels(left[:, n : n + 1], scale.float(), bits)
            levels[:, n : n + 1] = own.to(torch.int8)
            error = (left[:, n : n + 1] - own * scale.float()) / inverse[n, n]
            left[:, n:] -= error * inverse[n, n:]
    return levels, torch.cat(scales, 1)


def dequantise(q: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """The float32 matrix of `quantise`."""
    whole = q if bits == 8 else unpack(q, bits)
    return (whole.float().unflatten(1, (scale.shape[1], -1)) * scale.float()[..., None]).flatten(1)


def _levels(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    return (groups / scale).round().clamp(-half, half - 1)


def _searched(groups: Tensor, bits: int, counts: Tensor) -> Tensor:
    """Scales `[..., 1]` in float16, of either sign and never 0; `counts [n]`: what an entry counts."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    last = largest / -(1 << (bits - 1))
    best, least = torch.full_like(last, _SMALLEST).half(), torch.full_like(last, torch.inf)
    for factor in _FACTORS:
        for sign in (1, -1):
            scale = _as_half(last * factor * sign)
            levels = _levels(groups, scale.float(), bits)
            power = (counts * levels.square()).sum(-1, keepdim=True)
            fitted = (counts * groups * levels).sum(-1, keepdim=True) / power.clamp(min=1e-20)
            scale = _as_half(fitted)
            wide = scale.float()
            error = (counts * (groups - _levels(groups, wide, bits) * wide).square()).sum(-1, keepdim=True)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _as_half(scale: Tensor) -> Tensor:
    small = scale.abs() < _SMALLEST
    return torch.where(small, torch.full_like(scale, _SMALLEST), scale).half()


def pack(levels: Tensor, bits: int) -> Tensor:
    """Whole numbers of so many bits, `[out, in]` -> uint8 `[out, in * bits / 8]`, lowest bit first."""
    places = torch.arange(bits)
    raised = levels.to(torch.int32) + (1 << (bits - 1))
    stream = (raised[..., None] >> places) & 1
    octets = stream.flatten(1).unflatten(1, (-1, 8))
    return (octets << torch.arange(8)).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """int8 `[out, in]` of `pack`."""
    stream = (packed.to(torch.int32)[..., None] >> torch.arange(8)) & 1
    values = (stream.flatten(1).unflatten(1, (-1, bits)) << torch.arange(bits)).sum(-1)
    return (values - (1 << (bits - 1))).to(torch.int8)


def power_of(x: Tensor, moments: Tensor | None) -> float:
    """Sum of squares of a tensor, or of its products with inputs of such moments."""
    return float(x.square().sum() if moments is None else ((x @ moments) * x).sum())


def error_of(x: Tensor, bits: int, moments: Tensor | None = None) -> float:
    """`power_of` of what `bits` bits lose of a tensor."""
    if bits == 16:
        return power_of(x - x.bfloat16().float(), moments)
    return power_of(x - dequantise(*quantise(x, bits, moments), bits), moments)


def size_of(x: Tensor, bits: int) -> int:
    """Bytes of a tensor, without its entry in a file's head."""
    if bits == 16:
        return 2 * x.numel()
    return x.numel() * bits // 8 + 2 * (x.numel() // group_of(x))


def allowed(name: str, x: Tensor) -> tuple[int, ...]:
    """Widths a tensor may take: vectors are left alone, low-rank factors stay at six bits or more."""
    if x.dim() != 2:
        return (16,)
    if x.shape[1] % 8:
        return (8, 16)
    return tuple(w for w in WIDTHS if w >= 6) if ".lora_" in name else WIDTHS


def choose_widths(
    tensors: dict[str, Tensor],
    weights: dict[str, float],
    limit: int,
    head: int,
    moments: dict[str, Tensor] | None = None,
) -> dict[str, int]:
    """Bits for each tensor, so that the weighted errors together are small within `limit` bytes.

    All begin with the fewest; again and again the tensor whose next width saves most error for its bytes gets
    it. Widths between are taken to lose four times less for each bit.

    Args:
        weights: what a squared error of each tensor counts.
        head: bytes of a tensor's entry in a file's head.
        moments: of the inputs of matrices, by name, where known.
    """
    known = moments or {}
    widths = {name: allowed(name, x)[0] for name, x in tensors.items()}
    used = sum(
        size_of(x, widths[name]) + (2 if widths[name] < 16 else 1) * head for name, x in tensors.items()
    )
    errors = {
        name: error_of(x, widths[name], known.get(name)) * weights[name]
        for name, x in tensors.items()
        if widths[name] < 16
    }
    steps: list[tuple[float, str, int, int]] = []

    def offer(name: str) -> None:
        x, own = tensors[name], widths[name]
        after = [w for w in allowed(name, x) if w > own]
        if after:
            bytes_ = size_of(x, after[0]) - size_of(x, own)
            saved = errors[name] * (1 - 4.0 ** -(min(after[0], 9) - own))
            heapq.heappush(steps, (-saved / max(bytes_, 1), name, after[0], bytes_))  # scales of short rows

    for name in errors:
        offer(name)
    while steps:
        _, name, width, bytes_ = heapq.heappop(steps)
        if used + bytes_ > limit:
            continue
        errors[name] *= 4.0 ** -(min(width, 9) - widths[name])
        widths[name], used = width, used + bytes_
        offer(name)
    return widths
