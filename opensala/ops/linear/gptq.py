"""The GPTQ layout of quantised weights, as AutoGPTQ and GPTQModel write it: packing, unpacking, weights.

For weights `[N, K]` of `bits` 4 or 8, in groups of G columns (`group`), with P = 32 / bits codes in a word:

- `qweight` int32 `[K / P, N]`: word r of column n holds codes P r ... P r + P - 1 of output n, lowest bits
  first;
- `qzeros` int32 `[groups, N / P]`: the zero point of P neighbouring outputs, likewise;
- `scales` float16 `[groups, N]`;
- `g_idx` int32 `[K]`: the group of each column (k // G, unless columns were reordered by activation).

A weight is `scales[g, n] * (code - zero)`. In `checkpoint_format` "gptq" (version 1, what most files and
readers mean) **the stored zero point is one less than the real one**: 7 stands for 8. In "gptq_v2" it is the
real one. Reading one as the other shifts every weight by its scale, which ruins a model without any error
message.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BITS = (4, 8)
FORMATS = ("gptq", "gptq_v2")


class GptqTensors(NamedTuple):
    """See the module."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor


class Codes(NamedTuple):
    """Plain numbers of quantised weights: codes int32 `[N, K]` from 0 on, scales float32 and zeros int32
    `[N, groups]`, groups int64 `[K]`."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor

    def weights(self) -> Tensor:
        """The weights `[N, K]` that they stand for, float32."""
        zeros, scales = self.zeros[:, self.groups], self.scales[:, self.groups]
        return scales * (self.codes - zeros).float()


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes `[R, N]`, 0 to 2^bits - 1, into int32 words `[R * bits / 32, N]`, lowest bits first."""
    per_word = 32 // bits
    parts = codes.to(torch.int32).view(-1, per_word, codes.shape[1])
    words = torch.zeros(parts.shape[0], codes.shape[1], dtype=torch.int32, device=codes.device)
    for i in range(per_word):
        words |= parts[:, i] << bits * i
    return words


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The codes int32 `[R, N]` of words int32 `[R * bits / 32, N]`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words[:, None] >> shifts[:, None]) & (1 << bits) - 1).flatten(0, 1)


def gptq_shapes(outer: int, inner: int, bits: int, group: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor for weights `[outer, inner]`.

    Raises:
        ValueError: bits or a group that the layout does not take, or sizes that do not fill its words.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be {' or '.join(map(str, BITS))}, got {bits}")
    size = inner if group == -1 else group
    if size < 1 or inner % size:
        fitting = [n for n in (128, 64, 32, 16) if inner % n == 0]
        advice = f"; {', '.join(map(str, fitting))} or -1 would" if fitting else "; -1 (whole rows) would"
        raise ValueError(f"a group of {group} does not divide the {inner} columns of a weight{advice}")
    per_word = 32 // bits
    if inner % per_word or outer % per_word:
        raise ValueError(
            f"weights of {outer} x {inner} do not fill words of {per_word} codes: leave this layer out"
        )
    groups = inner // size
    return {
        "qweight": (inner // per_word, outer),
        "qzeros": (groups, outer // per_word),
        "scales": (groups, outer),
        "g_idx": (inner,),
    }


def to_gptq(codes: Codes, bits: int, layout: str = "gptq") -> GptqTensors:
    """Plain numbers in the layout. Zero points wrap: -1 of version 1's stored form is its highest code."""
    stored = (codes.zeros - int(layout == "gptq")) & (1 << bits) - 1
    return GptqTensors(
        pack_words(codes.codes.T.contiguous(), bits),
        pack_words(stored.contiguous(), bits).T.contiguous(),
        codes.scales.T.contiguous().half(),
        codes.groups.to(torch.int32),
    )


def from_gptq(tensors: GptqTensors, bits: int, layout: str = "gptq") -> Codes:
    """Plain numbers of tensors in the layout."""
    zeros = unpack_words(tensors.qzeros.T.contiguous(), bits)
    return Codes(
        unpack_words(tensors.qweight, bits).T.contiguous(),
        tensors.scales.T.float().contiguous(),
        (zeros + int(layout == "gptq")) & (1 << bits) - 1,
        tensors.g_idx.long(),
    )
