"""The Triton forms of compression, selection and block-sparse attention against the reference
implementations, on small shapes."""

import math

import pytest
import torch

from opensala.ops import (
    BlockSpec,
    compress_keys,
    exact_ties,
    extend_compressed,
    select_blocks,
    sparse_attention,
)
from opensala.ops.sparse.naive import naive_block_scores, naive_compress_keys
from tests.ops.grid import HAS_TRITON, TRITON_DEVICE, assert_close
from tests.ops.test_sparse import ODD, ODD_NAMES, SMALL, draw, gradients

if HAS_TRITON:
    from opensala.ops.sparse import (
        triton,
        triton_attend,
        triton_backward,
        triton_band,
        triton_pairs,
        triton_select,
        triton_top,
    )
    from opensala.ops.sparse.triton_rows import rows_of

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.filterwarnings(
        "ignore:divide by zero encountered in log2"
    ),  # a query that sees no key of a part: -inf is meant
]
SHAPES = [
    (220, 20, 4, 2, 16),
    (120, 30, 2, 2, 16),
    (300, 9, 8, 1, 60),
    (260, 1, 3, 1, 64),
    (200, 12, 16, 1, 16),
]


def on_device(*tensors):
    return [x.to(TRITON_DEVICE, torch.float32 if x.is_floating_point() else x.dtype) for x in tensors]


def assert_best(blocks, q, k, spec: BlockSpec, lse="coarse"):
    """Every row holds the best blocks by the float64 scores, up to near-ties: ascending, padded with -1, none
    twice."""
    scale = 1 / math.sqrt(q.shape[-1])
    for b in range(q.shape[0]):
        k1 = naive_compress_keys(k[b], spec.kernel_size, spec.kernel_stride)
        k2 = naive_compress_keys(k[b], spec.coarse_size, spec.coarse_stride)
        for t in range(q.shape[1]):
            position = k.shape[1] - q.shape[1] + t
            scores = naive_block_scores(q[b, t], k1, k2, spec, position, scale, lse)
            for h in range(k.shape[2]):
                row = blocks[b, t, h].tolist()
                count = min(spec.num_blocks, scores.shape[1])
                chosen = row[:count]
                assert (
                    row[count:] == [-1] * (spec.num_blocks - count)
                    and chosen == sorted(set(chosen))
                    and chosen[0] >= 0
                )
                worst, rest = (
                    scores[h, chosen].min(),
                    [x for n, x in enumerate(scores[h].tolist()) if n not in chosen],
                )
                assert max(rest, default=-math.inf) <= worst * (1 + 1e-5), (t, h)


@pytest.mark.parametrize(("length", "tokens", "heads", "kv_heads", "dim"), SHAPES, ids=str)
def test_selection_takes_the_best_blocks(length, tokens, heads, kv_heads, dim):
    q, k, _ = draw(length, tokens, heads, kv_heads, dim)
    assert_best(select_blocks(*on_device(q, k), SMALL, backend="triton").cpu(), q, k, SMALL)


@pytest.mark.parametrize(("lse", "cores"), [("coarse", 8), ("exact", 8)])
def test_programs_that_share_the_keys_of_a_query(lse, cores, monkeypatch):
    """As on a GPU with idle multiprocessors: several programs for each denominator, each row of scores and
    each list."""
    monkeypatch.setattr(triton_select, "cores", lambda _: cores)
    monkeypatch.setattr(triton_attend, "cores", lambda _: cores)
    q, k, v = draw(620, 2, 8, 2)
    q = 5 * q  # denominators that differ much from head to head
    blocks = select_blocks(*on_device(q, k), SMALL, lse=lse, backend="triton").cpu()
    assert_best(blocks, q, k, SMALL, lse)
    out = sparse_attention(*on_device(q, k, v, blocks), 16, backend="triton")
    assert_close(out, sparse_attention(q, k, v, blocks, 16, backend="naive"), 2e-5)


@pytest.mark.parametrize("spec", ODD, ids=ODD_NAMES)
def test_selection_for_any_spec(spec):
    q, k, _ = draw(330, 40, 6, 2, 20)
    assert_best(select_blocks(*on_device(q, k), spec, backend="triton").cpu(), q, k, spec)


@pytest.mark.parametrize(
    ("spec", "length"), [(SMALL, 100), (ODD[0], 163)], ids=["one block too many", "first coarse window"]
)
def test_queries_at_which_a_choice_begins(spec, length):
    """The first with more blocks than they may list, and with a window of the second level."""
    q, k, _ = draw(length, 12, 32, 4, 16)
    q = 40 * q  # denominators that differ much from head to head
    assert_best(select_blocks(*on_device(q, k), spec, backend="triton").cpu(), q, k, spec)


@pytest.mark.parametrize(("lse", "cores"), [("coarse", 1), ("exact", 1), ("exact", 2)])
def test_denominators_of_heads_that_look_at_different_places(lse, cores, monkeypatch):
    """Over several panels of keys, all in one program or in two that share them unevenly; all blocks in one
    program."""
    monkeypatch.setattr(triton_select, "cores", lambda _: cores)
    monkeypatch.setattr(triton_select, "PROGRAMS", 1)
    q, k, _ = draw(700, 3, 16, 1)
    q, spec = 20 * q, SMALL._replace(topk=12)
    assert_best(select_blocks(*on_device(q, k), spec, lse=lse, backend="triton").cpu(), q, k, spec, lse)


@pytest.mark.parametrize("programs", [1, 16], ids=["both panels in one program", "one each"])
def test_window_across_the_end_of_a_panel(programs, monkeypatch):
    """It starts in block 31 and ends in block 32, the first of the next panel: both get its score."""
    monkeypatch.setattr(triton_select, "PROGRAMS", programs)
    q, k, _ = draw(700, 2, 4, 2)
    q = 5 * q[:, :1, ::2].expand(1, 2, 2, -1).repeat_interleave(2, 2)
    k[0, 508:512], k[0, 512:516], k[0, 516:520] = q[0, 0, ::2], 0, -q[0, 0, ::2]
    spec = SMALL._replace(topk=5)
    blocks = select_blocks(*on_device(q, k), spec, backend="triton").cpu()
    assert_best(blocks, q, k, spec)
    assert all({31, 32} <= set(blocks[0, 0, h].tolist()) for h in range(2))


def test_window_that_ends_at_the_query():
    """It starts in the block before the query's own, which is not taken for being near, and decides for that
    block."""
    q, k, _ = draw(324, 1, 4, 2)
    q = 2 * q[:, :, ::2].repeat_interleave(2, 2)
    k[0, 312:316], k[0, 316:324] = -q[0, 0, ::2], q[0, 0, ::2]
    spec = SMALL._replace(window_size=0)
    blocks = select_blocks(*on_device(q, k), spec, backend="triton").cpu()
    assert_best(blocks, q, k, spec)
    assert (blocks == 19).any(-1).all()


@pytest.mark.parametrize("widest", [1 << 13, 16])
def test_of_blocks_that_tie_exactly_the_lower_is_taken(widest, monkeypatch):
    """In one piece, and in rows of scores that are walked in pieces."""
    monkeypatch.setattr(triton_top, "WIDEST", widest)
    q, _, _ = draw(300, 4, 2, 1, 16)
    k = torch.ones(1, 300, 1, 16, dtype=torch.float64)
    q, k = on_device(q, k)
    own = 299 // 16
    forced = [0, 1, own - 2, own - 1, own]
    wanted = sorted([*forced, *range(2, 2 + SMALL.num_blocks - len(forced))])
    assert select_blocks(q, k, SMALL, backend="triton")[0, 3, 0].tolist() == wanted


@pytest.mark.parametrize("widest", [1 << 14, 16])
def test_ties_fall_as_the_reference_lets_them_if_asked(widest, monkeypatch):
    """Neighbouring blocks share a window: many rows are tied at the edge of their choice."""
    monkeypatch.setattr(triton_top, "WIDEST", widest)
    monkeypatch.setattr(triton_select, "SCRATCH", 1)  # 64 queries at once
    q, k, _ = draw(500, 90, 2, 1)
    wanted = select_blocks(q, k, SMALL, backend="naive")
    q, k = on_device(q, k)
    fast = select_blocks(q, k, SMALL, backend="triton").cpu()
    with exact_ties():
        exact = select_blocks(q, k, SMALL, backend="triton").cpu()
    assert (fast != wanted).any(-1).double().mean() > 0.05
    assert torch.equal(exact, wanted)


@pytest.fixture(params=["by query", "by block"])
def path(request, monkeypatch):
    """Sends every call down one of the two paths of the forward pass, perhaps in the smallest chunks (64
    queries)."""
    monkeypatch.setattr(triton, "shared_enough", lambda *_: request.param != "by query")
    if request.param == "by block in chunks":
        monkeypatch.setattr(triton_pairs, "PART_BYTES", 1)
        monkeypatch.setattr(triton_pairs, "MARK_BYTES", 1)


def assert_all_close(got, wanted):
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, wanted, strict=True):
        assert_close(a.detach(), b.detach(), 2e-5, name)


@pytest.mark.parametrize(("length", "tokens", "heads", "kv_heads", "dim"), SHAPES, ids=str)
def test_attention_and_gradients_equal_naive(length, tokens, heads, kv_heads, dim, path):
    q, k, v = draw(length, tokens, heads, kv_heads, dim)
    v = v[..., : max(1, dim - 7)]
    blocks = select_blocks(q, k, SMALL)
    wanted = gradients("naive", q, k, v, blocks, SMALL)
    assert_all_close(gradients("triton", *on_device(q, k, v, blocks), SMALL), wanted)


@pytest.mark.parametrize("path", ["by query", "by block in chunks"], indirect=True)
def test_packed_documents_equal_naive(path, monkeypatch):
    monkeypatch.setattr(
        triton_backward, "SEGMENT", 32
    )  # of the first blocks of documents: several parts to add
    q, k, v = draw(210, 210, 2, 1, 16)  # chunks that begin some tiles behind the start
    cu = torch.tensor([0, 3, 150, 210])
    blocks = select_blocks(q, k, SMALL, cu_seqlens=cu)
    wanted = gradients("naive", q, k, v, blocks, SMALL, cu)
    assert_all_close(gradients("triton", *on_device(q, k, v, blocks), SMALL, cu.to(TRITON_DEVICE)), wanted)


def test_selection_in_packed_documents(monkeypatch):
    monkeypatch.setattr(triton_select, "SCRATCH", 1)  # 64 queries at once
    q, k, _ = draw(110, 110, 2, 1, 16)
    cu = torch.tensor([0, 3, 40, 110], device=TRITON_DEVICE)
    chosen = select_blocks(*on_device(q, k), SMALL, cu_seqlens=cu, backend="triton").cpu()
    for a, b in ((0, 3), (3, 40), (40, 110)):
        assert_best(chosen[:, a:b], q[:, a:b], k[:, a:b], SMALL)


@pytest.mark.parametrize(
    ("tokens", "path"), [(2, "by query"), (2, "by block"), (70, "by block in chunks")], indirect=["path"]
)
def test_rows_of_different_lengths_do_not_see_unused_room(tokens, path, monkeypatch):
    monkeypatch.setattr(triton_select, "SCRATCH", 1)  # 64 queries at once
    q, k, v = draw(240, tokens, 2, 1, 16, batch=2)
    lengths = torch.tensor([240, 170])
    k[1, 170:] = v[1, 170:] = float("nan")
    args, there = on_device(q, k, v), lengths.to(TRITON_DEVICE)
    blocks = select_blocks(*args[:2], SMALL, lengths=there, backend="triton")
    out = sparse_attention(*args, blocks, 16, lengths=there, backend="triton")
    for row, n in enumerate(lengths.tolist()):
        alone = (q[row : row + 1], k[row : row + 1, :n], v[row : row + 1, :n])
        assert_best(blocks[row : row + 1].cpu(), *alone[:2], SMALL)
        assert_close(
            out[row : row + 1],
            sparse_attention(*alone, blocks[row : row + 1].cpu(), 16, backend="naive"),
            2e-5,
        )


@pytest.mark.parametrize(
    ("heads", "size", "path"),
    [(1, 16, "by block"), (3, 24, "by block"), (3, 24, "by query")],
    indirect=["path"],
)
def test_any_lists_of_blocks_in_tiles_of_a_gpu(heads, size, path, monkeypatch):
    """Lists in any order, some without the block of the query itself; as many tiles and steps as a GPU would
    have."""
    for module in (triton_attend, triton_backward, triton_band, triton_pairs):
        monkeypatch.setattr(module, "triton_interpreted", lambda: False)
    q, k, v = draw(120, 33, heads, 1, 16)
    generator = torch.Generator().manual_seed(1)
    blocks = torch.full((1, 33, 1, 7), -1)
    for t in range(33):
        own = (87 + t) // size
        near = [own - n for n in range(4 if t % 3 else 2) if t % 5 or n] if t < 20 else []
        listed = torch.tensor(
            [n for n in {*near, *torch.randperm(own + 1, generator=generator)[:3].tolist()} if n >= 0]
        )
        blocks[0, t, 0, torch.randperm(7, generator=generator)[: len(listed)]] = listed
    wanted = gradients("naive", q, k, v, blocks, SMALL._replace(block_size=size))
    assert_all_close(
        gradients("triton", *on_device(q, k, v, blocks), SMALL._replace(block_size=size)), wanted
    )


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale, path):
    q, k, v = draw(130, 20, 4, 2, 16)
    blocks = select_blocks(q, k, SMALL)
    out = sparse_attention(*on_device(q, k, v, blocks), 16, scale=scale, backend="triton")
    assert_close(out, sparse_attention(q, k, v, blocks, 16, scale=scale, backend="naive"), 2e-5)


def test_long_calls_go_by_block():
    def asked(tokens, capacity, dim=128, dtype=torch.bfloat16):
        q, v = (
            torch.empty(1, tokens, 32, dim, dtype=dtype, device="meta"),
            torch.empty(1, 1, 2, dim, device="meta"),
        )
        return triton_pairs.shared_enough(
            q, v, torch.empty(1, tokens, 2, 96, device="meta"), 64, rows_of(q, capacity, None, None)
        )

    assert asked(4096, 4096) and asked(524_288, 524_288) and asked(200, 8192)
    assert not asked(1, 8192) and not asked(100, 8192) and not asked(200, 1 << 20)
    assert asked(4096, 4096, dtype=torch.float32) and not asked(4096, 4096, 256, torch.float32)


def test_compression_equals_naive():
    _, k, _ = draw(100, 1)
    for size, stride in ((8, 4), (32, 16)):
        got = compress_keys(*on_device(k), size, stride, backend="triton").cpu()
        assert (got - compress_keys(k, size, stride, backend="naive")).abs().max() < 1e-6


@pytest.mark.parametrize("starts", [[0], [0, 5]], ids=["a number", "numbers on the device"])
def test_compressed_keys_grow_as_keys_come(starts):
    _, k, _ = draw(120, 1, batch=len(starts))
    (keys,), past = on_device(k), torch.tensor(starts, device=TRITON_DEVICE)
    out = torch.full((len(starts), 40, 2, 16), float("nan"), device=TRITON_DEVICE)
    for step in (1, 7, 1, 40, 3, 50):
        extend_compressed(keys, out, past if len(starts) > 1 else int(past), step, 8, 4, backend="triton")
        past = past + step
    for row, (first, end) in enumerate(zip(starts, past.tolist(), strict=True)):
        wanted = compress_keys(k[row : row + 1, :end], 8, 4, backend="naive")
        there = range(max(0, (first - 8) // 4 + 1), wanted.shape[1])
        assert_close(out[row : row + 1, there.start : there.stop], wanted[:, there.start :], 1e-6)
        assert out[row, there.stop :].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")  # -inf - -inf, not used
@pytest.mark.parametrize(("together", "more"), [(4, True), (8, False), (32, True)])
def test_merging_parts(monkeypatch, together, more):
    """Several steps, a last one that is not full, and all parts at once; parts that were never written are
    NaN, one row has no part at all."""
    rows, count, width = 6, 21, 20
    lse = torch.randn(rows, count) * 3
    lse[torch.rand(rows, count) < 0.4] = -math.inf
    lse[3] = -math.inf
    parts = torch.randn(rows, count, width)
    out, out_lse = torch.randn(rows, width), torch.randn(rows)
    whole = torch.cat([lse, out_lse[:, None]], 1) if more else lse
    values = torch.cat([parts, out[:, None]], 1) if more else parts
    total = torch.logsumexp(whole.double() * math.log(2), 1) / math.log(2)
    weights = torch.exp2(whole.double() - total[:, None]).nan_to_num(0)
    wanted = (weights[..., None] * values.double()).sum(1)
    parts[lse == -math.inf] = math.nan
    config = triton_attend.merge_config

    def changed(*sizes):
        return {**config(*sizes), "R": 4, "TOGETHER": together}

    monkeypatch.setattr(triton_attend, "merge_config", changed)
    parts, lse, out, out_lse = on_device(parts, lse, out, out_lse)
    triton_attend.merge(parts, lse, out, out_lse, count, count, 1, 1, more)
    assert_close(out, wanted, 1e-5)
    assert torch.equal(out_lse.cpu() == -math.inf, total == -math.inf)
    assert_close(out_lse.nan_to_num(neginf=0), total.nan_to_num(neginf=0), 1e-5)
