"""Products of few rows with 4- and 8-bit weights in Triton, on a GPU or in the interpreter."""

import pytest
import torch

from opensala.ops.linear.gptq import from_gptq, to_gptq
from tests.ops.grid import HAS_TRITON, TRITON_DEVICE
from tests.ops.test_gptq_layout import codes_of

if HAS_TRITON:
    from opensala.ops.linear import triton_gptq

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
]


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(
    "outer, inner, bits, group, layout",
    [
        (72, 128, 4, 64, "gptq"),
        (64, 128, 4, 16, "gptq_v2"),
        (8, 96, 4, 48, "gptq"),
        (136, 256, 8, 128, "gptq"),
        (64, 512, 4, -1, "gptq"),
        (64, 64, 8, 64, "gptq_v2"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_weights_written_out(rows, outer, inner, bits, group, layout, dtype):
    size = inner if group == -1 else group
    codes = codes_of(outer, inner, bits, size)
    tensors = to_gptq(codes, bits, layout)
    x = torch.randn(rows, inner).to(dtype)
    moved = type(tensors)(*(t.to(TRITON_DEVICE) for t in tensors))
    found = triton_gptq.triton_gptq(x.to(TRITON_DEVICE), moved, bits, group, layout)
    wanted = x.double() @ from_gptq(tensors, bits, layout).weights().double().T
    assert found.dtype == dtype
    error = (found.cpu().double() - wanted).abs().max() / wanted.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 2e-3), "float16 rounds weights and result"


def test_what_the_kernel_is_not_for():
    refused = triton_gptq.beyond_triton
    assert refused(128, 64, 16, True) is None and refused(128, -1, 1, True) is None
    assert "16 rows at most, got 17" in refused(128, 64, 17, True)
    assert "another order" in refused(128, 64, 1, False)
    assert "16 must divide the group, got 8" in refused(128, 8, 1, True)
