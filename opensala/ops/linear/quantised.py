"""Weights of a linear layer in 8- or 4-bit codes, and products with them on a CPU.

Layout, which `ops/native/linear.h` reads (`Weights`, kinds 3 and 4). For weights `[N, K]` in groups of G
columns:

- a weight is `scales[n, k // G] * (q[n, k] - zeros[n, k // G])`, computed in float32 in this order;
- 8 bits: codes are int8 `[N, K]`, q from -128 to 127; without `zeros` they count as 0;
- 4 bits: q from 0 to 15; without `zeros` they count as 8. Codes are int32 `[N, ceil(K / 128), 16]`: of the
  128 columns from 128 c on, word l holds column 128 c + 16 j + l in its bits 4 j ... 4 j + 3, so that 16
  words shifted by 4 j are 16 neighbouring columns;
- `scales` and `zeros` are float32 `[N, ceil(K / G)]`; `zeros` need not be whole numbers. G is a multiple of
  16, or K.

A file in GPTQ's layout (`qweight` `[K / 8, N]`, eight codes along K in a word; `qzeros`; `scales`
`[K / G, N]`) is unpacked to plain integers `[N, K]` first; `QuantisedWeight.from_codes` packs those.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import Backend, choose_backend
from ..native import library
from ..native.tensors import address, inner_contiguous, plain, threads

CHUNK = 128  # columns whose 4-bit codes lie together
_WORDS = 16
KINDS = {8: 3, 4: 4}  # as `Weights` in ops/native/linear.h numbers them


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """See the module; made by `from_codes`.

    Attributes:
        codes, scales, zeros: see the module.
        bits: 8 or 4.
        group: G.
        inner: K.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    inner: int

    @classmethod
    def from_codes(
        cls, codes: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group: int
    ) -> "QuantisedWeight":
        """Pack plain codes.

        Args:
            codes (Tensor): `[N, K]`, integers.
            scales (Tensor): `[N, ceil(K / group)]`.
            zeros (Tensor): the same, or None for the middle of the codes (0 for 8 bits, 8 for 4).
            bits: 8 or 4.
            group: columns that share a scale; a multiple of 16, or at least K for one scale a row.

        Raises:
            ValueError: bits, a group, shapes or codes that the layout does not take.
        """
        rows, inner = _check(codes, scales, zeros, bits, group)
        low, high = (-128, 127) if bits == 8 else (0, 15)
        if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
            found = f"{int(codes.min())} to {int(codes.max())}"
            raise ValueError(f"codes of {bits} bits must lie between {low} and {high}, got {found}")
        packed = codes.to(torch.int8).contiguous()
        if bits == 4:
            filled = torch.nn.functional.pad(codes.to(torch.int32), (0, -inner % CHUNK))
            words = filled.view(rows, -1, CHUNK // _WORDS, _WORDS)
            packed = torch.zeros(rows, words.shape[1], _WORDS, dtype=torch.int32)
            for j in range(CHUNK // _WORDS):
                packed |= words[:, :, j] << 4 * j
        zeros = None if zeros is None else zeros.to(torch.float32).contiguous()
        return cls(packed, scales.to(torch.float32).contiguous(), zeros, bits, group, inner)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.inner

    @property
    def num_bytes(self) -> int:
        tensors = [self.codes, self.scales, *([] if self.zeros is None else [self.zeros])]
        return sum(x.numel() * x.element_size() for x in tensors)

    def plain_codes(self) -> Tensor:
        """`[N, K]` int8, as `from_codes` took them."""
        if self.bits == 8:
            return self.codes
        parts = [self.codes >> 4 * j & 15 for j in range(CHUNK // _WORDS)]
        return torch.stack(parts, 2).flatten(1)[:, : self.inner].to(torch.int8)

    def dequantised(self) -> Tensor:
        """The weights `[N, K]` that the codes stand for, float32."""
        zeros = self.zeros
        if zeros is None:
            zeros = torch.full_like(self.scales, 0.0 if self.bits == 8 else 8.0)
        scales, zeros = (
            x.repeat_interleave(self.group, 1, output_size=x.shape[1] * self.group)[:, : self.inner]
            for x in (self.scales, zeros)
        )
        return scales * (self.plain_codes().float() - zeros)


def _check(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int) -> tuple[int, int]:
    if bits not in KINDS:
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    if codes.dim() != 2:
        raise ValueError(f"codes must be [N, K], got {list(codes.shape)}")
    rows, inner = codes.shape
    if group < 1 or (group % 16 and group < inner):
        raise ValueError(f"group must be a multiple of 16, or at least K = {inner}, got {group}")
    wanted = (rows, -(-inner // group))
    for name, x in (("scales", scales), ("zeros", zeros)):
        if x is not None and tuple(x.shape) != wanted:
            raise ValueError(f"{name} must be [N, ceil(K / group)] = {list(wanted)}, got {list(x.shape)}")
    return rows, inner


def quantised_linear(
    x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None, *, backend: Backend | None = None
) -> Tensor:
    """x W^T + b with the weights that the codes stand for, in float32. No gradients.

    With `cpp` the bits are those of `linear(x, weight.dequantised(), bias)`: batch-invariant, and the same in
    a product of one row as of many.

    Args:
        x (Tensor): `[..., K]`, float32.
        weight: `[N, K]`.
        bias (Tensor): `[N]`, or None.
        backend: `cpp`, or `torch` (which writes the weights out each time).

    Returns:
        `[..., N]`, float32.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unavailable backend.
    """
    rows, inner = weight.shape
    if x.dim() == 0 or x.shape[-1] != inner or x.dtype != torch.float32:
        raise ValueError(f"x must be float32 [..., {inner}], got {x.dtype} {list(x.shape)}")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias must be [{rows}], one for each row of weight; got {list(bias.shape)}")
    if choose_backend("quantised_linear", x, backend, {"cpp": None}) != "cpp":
        return torch.nn.functional.linear(x, weight.dequantised().to(x.device), bias)
    flat = inner_contiguous(x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), inner))
    out = torch.empty(*x.shape[:-1], rows, dtype=torch.float32)
    library().call(
        "opensala_linear",
        address(flat),
        address(weight.codes),
        KINDS[weight.bits],
        address(weight.scales),
        address(weight.zeros),
        min(weight.group, max(1, inner)),
        address(None if bias is None else plain(bias)),
        address(out),
        flat.shape[0],
        inner,
        rows,
        flat.stride(0),
        threads(),
    )
    return out
