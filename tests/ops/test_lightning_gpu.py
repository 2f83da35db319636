"""What only a GPU can show of Lightning attention's Triton kernels: 64-bit offsets, CUDA graphs, no waiting
for the GPU."""

import pytest
import torch

from opensala.ops import alibi_slopes, lightning_attention
from tests.ops.grid import assert_close

pytestmark = [pytest.mark.triton, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
HEADS, DIM = 32, 128


def normal(*shape, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype, device="cuda")


def slopes(heads=HEADS):
    return torch.tensor(alibi_slopes(heads), device="cuda")


@pytest.mark.large_memory
def test_more_elements_than_32_bits_can_count():
    length, tail = 600_000, 4096
    assert length * HEADS * DIM > 2**31
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    q, k, v = (normal(1, length, HEADS, DIM, seed=n).requires_grad_() for n in range(3))
    weights = normal(1, 100, HEADS, DIM, seed=3)
    o, state = lightning_attention(q, k, v, slopes(), backend="triton")
    (o[:, -100:] * weights).sum().backward()
    with torch.no_grad():
        head = (x[:, : length // 2] for x in (q, k, v))
        _, half = lightning_attention(*head, slopes(), backend="triton")
        middle = (x[:, length // 2 : length - tail] for x in (q, k, v))
        _, before = lightning_attention(*middle, slopes(), initial_state=half, backend="triton")
    last = [x.detach()[:, length - tail :].clone().requires_grad_() for x in (q, k, v)]
    o_last, state_last = lightning_attention(*last, slopes(), initial_state=before, backend="triton")
    (o_last[:, -100:] * weights).sum().backward()
    # bfloat16 factors, rounded at other places of the sequence in the two runs: 2^-8 each
    assert_close(o.detach()[:, length - tail :], o_last.detach().cpu(), 2e-2, "o")
    assert_close(state, state_last.detach().cpu(), 2e-2, "state")
    for name, whole, part in zip("qkv", (q, k, v), last, strict=True):
        assert_close(whole.grad[:, length - tail :], part.grad.cpu(), 2e-2, f"d{name}")


def test_decode_step_in_a_cuda_graph():
    inputs = [normal(2, 1, HEADS, DIM, seed=n) for n in range(3)]
    state = normal(2, HEADS, DIM, DIM, dtype=torch.float32)
    lightning_attention(*inputs, slopes(), initial_state=state, backend="triton")  # compiles
    decay = slopes()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, final = lightning_attention(*inputs, decay, initial_state=state, backend="triton")
        state.copy_(final)
    for step in range(3):
        for n, x in enumerate(inputs):
            x.copy_(normal(2, 1, HEADS, DIM, seed=10 * step + n))
        before = state.clone()
        graph.replay()
        wanted, wanted_state = lightning_attention(*inputs, decay, initial_state=before, backend="torch")
        assert_close(o, wanted.cpu(), 1e-2)
        assert_close(state, wanted_state.cpu(), 1e-5)


@pytest.mark.parametrize("length", [1, 700, 5000])
def test_packed_documents_do_not_wait_for_the_gpu(length):
    q, k, v = (normal(1, length, 4, 64, seed=n).requires_grad_() for n in range(3))
    cu = torch.tensor([0, length] if length == 1 else [0, 1, 300, length], dtype=torch.int32, device="cuda")
    decay = slopes(4)
    for _ in range(2):  # the first call compiles
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            o, state = lightning_attention(q, k, v, decay, cu_seqlens=cu, backend="triton")
            (o.sum() + state.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    wanted, wanted_state = lightning_attention(q, k, v, decay, cu_seqlens=cu, backend="torch")
    assert_close(o.detach(), wanted.detach().cpu(), 2e-2)
    assert_close(state.detach(), wanted_state.detach().cpu(), 2e-2)
