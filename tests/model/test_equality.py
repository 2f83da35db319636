"""The equality chain: one-shot == chunked == token by token == padded batch == packed documents.

Sequences are long enough that sparse attention leaves blocks out, and cross `dense_len`.
"""

import pytest
import torch

from opensala import SALACache

from ..conftest import tiny_model

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}  # float32, logits of order 1: different summation orders only


def tokens(length, seed=0, batch=1):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def chunked(model, ids, sizes, mask=None):
    cache, outputs, start = SALACache(model.config), [], 0
    total = [ids.shape[1]] * ids.shape[0] if mask is None else mask.sum(1).tolist()
    cache.begin_prompt(total)
    while start < ids.shape[1]:
        end = min(start + sizes, ids.shape[1])
        part = None if mask is None else mask[:, :end]
        outputs.append(model(ids[:, start:end], attention_mask=part, past_key_values=cache).logits)
        start = end
    return torch.cat(outputs, 1), cache


@pytest.mark.parametrize("mode", ["auto", "dense", "sparse"])
@pytest.mark.parametrize("length", [50, 63, 64, 300])
@pytest.mark.parametrize("size", [1, 7, 16, 63, 64, 1000])
def test_any_chunk_size_equals_one_shot(mode, length, size):
    model = tiny_model(attention_mode=mode)
    ids = tokens(length)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    got, cache = chunked(model, ids, size)
    torch.testing.assert_close(got, whole, **TOLERANCE)
    assert cache.lengths == [length]


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_qk_norm": True, "attention_bias": True},
        {"lightning_nkv": 2},
        {"attn_use_rope": True, "lightning_use_rope": False},
        {"use_output_gate": False, "use_output_norm": False, "attn_use_output_gate": False, "qk_norm": False},
        {"lightning_scale": "1/d"},
        {"lightning_scale": 0.5, "num_key_value_heads": 4},
        {"tie_word_embeddings": True},
        {
            "sparse_config": {
                "kernel_size": 8,
                "kernel_stride": 4,
                "block_size": 16,
                "init_blocks": 1,
                "window_size": 32,
                "topk": 5,
                "dense_len": 64,
                "lse": "exact",
            }
        },
    ],
    ids=lambda c: ",".join(c),
)
def test_options_keep_the_equality(changes):
    model, ids = tiny_model(**changes), tokens(200)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(chunked(model, ids, 37)[0], whole, **TOLERANCE)


def test_decoding_crosses_dense_len_token_by_token():
    """Prefill below dense_len, then one token at a time: the step that reaches dense_len is the first sparse
    one."""
    model, ids = tiny_model(), tokens(260)
    config = model.config
    with torch.no_grad():
        cache = SALACache(config)
        model(ids[:, :40], past_key_values=cache)
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 260)]
        for position in (62, 63, 130, 259):
            forced = tiny_model(attention_mode="sparse" if position + 1 >= config.dense_len else "dense")
            # The caches hold different hidden states below dense_len only if sparse attention
            # left blocks out there: it cannot.
            assert config.dense_len <= config.block_spec.num_blocks * config.block_spec.block_size
            expected = forced(ids[:, : position + 1], use_cache=False).logits[:, -1:]
            torch.testing.assert_close(steps[position - 40], expected, **TOLERANCE)


def padded(rows, side):
    width = max(r.shape[1] for r in rows)
    ids, mask = torch.full((len(rows), width), 2), torch.zeros(len(rows), width, dtype=torch.long)
    for n, row in enumerate(rows):
        place = slice(width - row.shape[1], None) if side == "left" else slice(0, row.shape[1])
        ids[n, place], mask[n, place] = row[0], 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 50, 1000])
def test_padded_batch_equals_single_rows(side, size):
    model, rows = tiny_model(), [tokens(n, seed=n) for n in (9, 250, 64, 131)]
    ids, mask = padded(rows, side)
    got, cache = chunked(model, ids, size, mask)
    for n, row in enumerate(rows):
        with torch.no_grad():
            alone = model(row, use_cache=False).logits[0]
        torch.testing.assert_close(got[n][mask[n].bool()], alone, **TOLERANCE)
    assert cache.lengths == [9, 250, 64, 131]
    if size == 1000:
        with torch.no_grad():
            torch.testing.assert_close(
                model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()],
                got[mask.bool()],
                **TOLERANCE,
            )


def test_padded_batch_continues_like_single_rows():
    model, rows = tiny_model(), [tokens(n, seed=n) for n in (9, 250)]
    ids, mask = padded(rows, "left")
    _, cache = chunked(model, ids, 100, mask)
    more = tokens(30, seed=5, batch=2)
    with torch.no_grad():
        got = [
            model(
                more[:, i : i + 1],
                past_key_values=cache,
                attention_mask=torch.cat([mask, torch.ones(2, i + 1, dtype=torch.long)], 1),
            ).logits
            for i in range(30)
        ]
        for n, row in enumerate(rows):
            single = SALACache(model.config)
            model(row, past_key_values=single)
            alone = [model(more[n : n + 1, i : i + 1], past_key_values=single).logits for i in range(30)]
            torch.testing.assert_close(torch.cat(got, 1)[n], torch.cat(alone, 1)[0], **TOLERANCE)


@pytest.mark.parametrize("how", ["cu_seqlens", "position_ids"])
def test_packed_documents_equal_separate_ones(how):
    model, lengths = tiny_model(), (5, 200, 64, 1)
    rows = [tokens(n, seed=n) for n in lengths]
    packed = torch.cat(rows, 1)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    arguments = {"cu_seqlens": bounds} if how == "cu_seqlens" else {"position_ids": positions}
    with torch.no_grad():
        got = model(packed, use_cache=False, **arguments).logits[0]
        alone = torch.cat([model(row, use_cache=False).logits[0] for row in rows])
    torch.testing.assert_close(got, alone, **TOLERANCE)


def test_second_turn_with_several_tokens_equals_one_shot_tokens():
    """Continuing a sparse context by many tokens at once equals continuing one by one."""
    model, ids = tiny_model(), tokens(290)
    with torch.no_grad():
        one, many = SALACache(model.config), SALACache(model.config)
        model(ids[:, :200], past_key_values=one)
        model(ids[:, :200], past_key_values=many)
        slow = torch.cat([model(ids[:, i : i + 1], past_key_values=one).logits for i in range(200, 290)], 1)
        torch.testing.assert_close(model(ids[:, 200:], past_key_values=many).logits, slow, **TOLERANCE)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_training_gradients_do_not_depend_on_packing(mode):
    lengths = (130, 70)
    rows = [tokens(n, seed=n) for n in lengths]

    def gradient(packed):
        model = tiny_model(attention_mode=mode).train()
        if packed:
            model(
                torch.cat(rows, 1), cu_seqlens=torch.tensor([0, 130, 200]), use_cache=False
            ).logits.square().sum().backward()
        else:
            for row in rows:
                model(row, use_cache=False).logits.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters()}

    separate = gradient(False)
    for name, grad in gradient(True).items():
        torch.testing.assert_close(
            grad, separate[name], atol=1e-3 * separate[name].abs().max().item(), rtol=1e-3
        )


def test_gradient_checkpointing_replays_the_same_gradients():
    ids = tokens(150)

    def gradient(checkpointing):
        model = tiny_model(attention_mode="sparse").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters()]

    for got, wanted in zip(gradient(True), gradient(False), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype):
    model, ids = tiny_model(), tokens(100)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        half = tiny_model().to(dtype)
        got, cache = chunked(half, ids, 33)
    assert got.dtype == cache.storage.kv[0].keys.dtype == dtype
    assert cache.storage.states[1].dtype == torch.float32
    # 2^-8 (bf16) or 2^-11 (fp16) at each of about 10 roundings a layer, and selections may flip on near-ties
    assert (got - wanted).abs().mean() / wanted.abs().mean() < (0.05 if dtype == torch.bfloat16 else 0.01)
