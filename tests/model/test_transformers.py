"""The model as a transformers citizen: generate in its variants, Trainer, PEFT."""

import logging
from functools import partialmethod

import pytest
import torch
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

from opensala import MiniCPMSALAConfig, MiniCPMSALAModel, SALACache
from opensala.model import describe_attention
from opensala.model.compat import CACHE_ARGUMENT, CACHE_NAMES
from opensala.ops import use_backend

from ..conftest import tiny_config, tiny_model
from .test_equality import padded, tokens

LENGTH = 150
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


@torch.no_grad()
def greedy_by_hand(model, ids, count):
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_auto_classes_know_the_model():
    assert isinstance(AutoConfig.for_model("minicpm_sala"), MiniCPMSALAConfig)
    assert isinstance(AutoModel.from_config(tiny_config()), MiniCPMSALAModel)


@pytest.mark.parametrize("size", [None, 1, 63, 64, 1000])
def test_generate_with_any_prefill_chunk_size(size):
    model, ids = tiny_model(), tokens(LENGTH)
    got = model.generate(ids, prefill_chunk_size=size, **GREEDY)
    assert torch.equal(got, greedy_by_hand(model, ids, 12))


@pytest.mark.parametrize("size", [None, 40])
def test_generate_for_a_left_padded_batch(size):
    model, rows = tiny_model(), [tokens(n, seed=n) for n in (LENGTH, 20, 63)]
    ids, mask = padded(rows, "left")
    got = model.generate(ids, attention_mask=mask, prefill_chunk_size=size, **GREEDY)
    for n, row in enumerate(rows):
        assert torch.equal(got[n, -12:], greedy_by_hand(model, row, 12)[0, -12:])


def test_generate_continues_a_cache():
    model, ids = tiny_model(), tokens(LENGTH)
    cache = SALACache(model.config)
    first = model.generate(ids, past_key_values=cache, **GREEDY)
    longer = torch.cat([first, tokens(20, seed=4)], 1)
    got = model.generate(longer, past_key_values=cache, **GREEDY)
    assert torch.equal(got, model.generate(longer, **GREEDY))


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_used_under_every_name(name):
    model, ids = tiny_model(), tokens(LENGTH)
    cache = SALACache(model.config)
    with torch.no_grad():
        model(ids[:, :100], **{name: cache})
        got = model(ids[:, 100:], **{name: cache}).logits
        wanted = model(ids, use_cache=False).logits[:, 100:]
    assert cache.padded_length == LENGTH
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
    fresh = SALACache(model.config)
    assert torch.equal(model.generate(ids, **{name: fresh}, **GREEDY), greedy_by_hand(model, ids, 12))
    assert fresh.padded_length == LENGTH + 11


def test_a_cache_that_would_not_be_used_is_an_error():
    model, ids = tiny_model(), tokens(30)
    cache = SALACache(model.config)
    with pytest.raises(ValueError, match="kv_cache.*which this model does not read"):
        model(ids, kv_cache=cache)
    with pytest.raises(ValueError, match="give the cache once"):
        model(ids, past_key_values=cache, cache=cache)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, past_key_values=cache, use_cache=False)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(ids, past_key_values=cache, use_cache=False, **GREEDY)


def test_generate_refuses_a_version_that_loses_the_cache(monkeypatch):
    """What happened under transformers 5.24: the cache arrived nowhere, and the answer came from an empty
    one."""
    model = tiny_model()
    monkeypatch.setattr(type(model), "forward", partialmethod(forget_the_cache, type(model).forward))
    with pytest.raises(RuntimeError, match="never saw the cache"):
        model.generate(tokens(30), **GREEDY)


def forget_the_cache(model, forward, *args, **kwargs):
    for name in CACHE_NAMES:
        kwargs.pop(name, None)
    return forward(model, *args, **kwargs)


def test_generate_refuses_a_cache_that_holds_all_of_the_prompt():
    model, ids = tiny_model(), tokens(LENGTH)
    cache = SALACache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="already holds 150 tokens and the prompt has 150"):
        model.generate(ids, past_key_values=cache, **GREEDY)
    assert cache.padded_length == LENGTH


@pytest.mark.parametrize("mask", [False, True])
def test_packed_positions_never_share_a_cache(mask):
    """A forward that makes a cache by default must still keep packed documents apart."""
    model, lengths = tiny_model(), (40, 90, 20)
    ids = tokens(sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    extra = {"attention_mask": torch.ones_like(ids)} if mask else {}
    with torch.no_grad():
        got = model(ids, position_ids=positions, **extra)
        alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(got.logits, alone, atol=2e-5, rtol=1e-4)
    assert got.get(CACHE_ARGUMENT) is None


def test_packed_positions_that_cannot_be_kept_apart_are_refused():
    model, ids = tiny_model(), tokens(30, batch=2)
    positions = torch.cat([torch.arange(10), torch.arange(20)]).expand(2, 30)
    with torch.no_grad():
        with pytest.raises(ValueError, match="single row without padding"):
            model(ids, position_ids=positions)
        mask = torch.ones(1, 30, dtype=torch.long)
        mask[0, 3] = 0
        with pytest.raises(ValueError, match="single row without padding"):
            model(ids[:1], position_ids=positions[:1], attention_mask=mask)


def test_beam_search_and_several_sequences():
    model, ids = tiny_model(), tokens(LENGTH)
    with_cache = model.generate(ids, num_beams=3, num_return_sequences=2, **GREEDY)
    without = model.generate(ids, num_beams=3, num_return_sequences=2, use_cache=False, **GREEDY)
    assert torch.equal(with_cache, without)
    torch.manual_seed(0)
    sampled = model.generate(ids, **{**GREEDY, "do_sample": True}, num_return_sequences=3)
    assert sampled.shape == (3, LENGTH + 12)


def test_prompt_lookup_decoding_rolls_back_exactly():
    model, ids = tiny_model(), tokens(30).repeat(1, 5)
    got = model.generate(ids, prompt_lookup_num_tokens=5, **GREEDY)
    assert torch.equal(got, greedy_by_hand(model, ids, 12))


def test_static_caches_are_refused():
    with pytest.raises(ValueError, match="cache_implementation must be unset or 'dynamic'"):
        tiny_model().generate(tokens(10), cache_implementation="static", **GREEDY)


def test_hidden_states_and_last_logits():
    model, ids = tiny_model(), tokens(20)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        assert len(output.hidden_states) == 5 and output.hidden_states[0].shape == (1, 20, 32)
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, output.logits[:, -3:])
        embedded = model(inputs_embeds=model.model.embed_tokens(ids)).logits
    torch.testing.assert_close(embedded, output.logits)


def test_inputs_must_fit():
    model, ids = tiny_model(), tokens(20)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids, attention_mask=torch.ones(1, 1, 20, 20))
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        model(ids, cu_seqlens=torch.tensor([0, 30]), use_cache=False)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, cu_seqlens=torch.tensor([0, 10, 20]), use_cache=True)


def test_mode_and_backend_are_said_once(caplog):
    model, ids = tiny_model(), tokens(100)
    with caplog.at_level(logging.INFO, "opensala"), torch.no_grad(), use_backend("torch"):
        for _ in range(3):
            model(ids[:, :20])
            model(ids)
        wanted = [describe_attention(model.config, mode, torch.zeros(1)) for mode in ("dense", "sparse")]
    lines = [r.getMessage() for r in caplog.records if "sparse layers" in r.getMessage()]
    assert lines == wanted
    assert "2 sparse layers block-sparse, 7 blocks of 16 (torch); 2 lightning layers (torch)" in lines[1]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, n):
        ids = tokens(40, seed=n % 2)[0]
        return {"input_ids": ids, "labels": ids}


def train(model, folder, steps=12):
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_lowers_the_loss(tmp_path):
    losses = train(tiny_model(attention_mode="sparse").train(), str(tmp_path))
    assert losses[-1] < 0.7 * losses[0]


def test_peft_lora_trains_only_its_own_weights(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model().train(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_gate", "z_proj"])
    )
    before = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}
    losses = train(model, str(tmp_path))
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "lora" not in n)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    ids = tokens(30)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
