"""Keys and values in 16 or eight bits: an engine's promises hold, and its answers are near those in full
precision."""

from dataclasses import replace

import pytest
import torch

from opensala.contexts import Context
from opensala.contexts.identity import check_identity, identity
from opensala.engine import EngineOptions, ask, load_engine
from opensala.ops.sparse import num_windows

from ..contexts.files import content
from ..contexts.tools import DENSE_LEN, PARAMS, documents, engine, model, outcome, tokenizer

QUESTIONS = ("what is the code?", "where are the red falcons near the old mill tower?")


FEWER = ("bfloat16", "int8")


@pytest.mark.parametrize("kv_dtype", FEWER)
@pytest.mark.parametrize("length", [20, DENSE_LEN - 1, DENSE_LEN + 7, 900])
def test_cut_otherwise_or_kept_it_gives_the_same_bits(length, kv_dtype, tmp_path):
    of, docs = model(), documents(length)

    def made(**changes):
        return engine(of, kv_dtype=kv_dtype, **changes)

    wanted = [outcome(ask(made(), docs, q, PARAMS, quiet=True)) for q in QUESTIONS]
    other = made(max_batch_tokens=7)
    assert [outcome(ask(other, docs, q, PARAMS, quiet=True)) for q in QUESTIONS] == wanted
    Context.ingest(made(), docs, tmp_path / "a.ctx").close()
    Context.ingest(made(max_batch_tokens=13), docs, tmp_path / "b.ctx").close()
    assert content(tmp_path / "a.ctx") == content(tmp_path / "b.ctx")
    with Context.open(made(), tmp_path / "a.ctx") as context:
        assert [outcome(context.ask(q, PARAMS)) for q in QUESTIONS] == wanted


@pytest.mark.parametrize("kv_dtype", FEWER)
def test_answers_are_near_those_in_full_precision(kv_dtype):
    """And not the same: the option does something."""
    of, docs = model(), documents(900)
    engines = engine(of), engine(of, kv_dtype=kv_dtype)
    near = [ask(e, docs, QUESTIONS[0], PARAMS, quiet=True) for e in engines]
    assert near[0].confidence == pytest.approx(near[1].confidence, rel=0.05)
    assert near[0].confidence != near[1].confidence


@pytest.mark.parametrize(("kv_dtype", "row"), [("bfloat16", 16), ("int8", 8 + 4)])
def test_the_bytes_that_are_reported_are_those_of_fewer_bits(kv_dtype, row):
    """A key or value of 8 numbers takes `row` bytes instead of 32, a compressed key 16; states stay."""
    of, docs = model(), documents(900)
    engines = engine(of), engine(of, kv_dtype=kv_dtype)
    full, small = (ask(e, docs, QUESTIONS[0], PARAMS, quiet=True) for e in engines)
    length, spec = full.prompt_tokens + full.new_tokens, of.config.block_spec
    assert small.prompt_tokens + small.new_tokens == length and of.config.head_dim == 8
    windows = num_windows(length, spec.kernel_size, spec.kernel_stride)
    windows += num_windows(length, spec.coarse_size, spec.coarse_stride)
    saved = 2 * length * (32 - row) + windows * (32 - 16)
    sparse = sum(of.config.is_sparse(i) for i in range(of.config.num_hidden_layers))
    assert full.cache_bytes - small.cache_bytes == sparse * of.config.num_key_value_heads * saved
    pools = engines[1].storage.kv.values()
    assert {x.dtype for pool in pools for x in pool[2:]} == {torch.bfloat16}


@pytest.mark.parametrize("kv_dtype", FEWER)
def test_a_context_is_bound_to_it(kv_dtype, tmp_path):
    of, docs = model(), documents(300)
    fewer = engine(of, kv_dtype=kv_dtype)
    Context.ingest(fewer, docs, tmp_path / "a.ctx").close()
    Context.ingest(engine(of), docs, tmp_path / "b.ctx").close()
    for path, where, message in (
        ("a.ctx", engine(of), f"kept in kv_dtype {kv_dtype} in the context and float32 here"),
        ("b.ctx", fewer, f"kept in kv_dtype float32 in the context and {kv_dtype} here"),
    ):
        with pytest.raises(ValueError, match=f"made by another model: keys and values are {message}"):
            Context.open(where, tmp_path / path)


def test_a_context_whose_compressed_keys_are_wider_is_refused_by_name(tmp_path):
    """As int8 wrote them before they were kept in 16 bits."""
    of = engine(kv_dtype="int8")
    Context.ingest(of, documents(300), tmp_path / "a.ctx").close()
    here = identity(of)
    there = {name: value for name, value in here.items() if name != "compressed_dtype"}
    with pytest.raises(
        ValueError, match="compressed keys are kept in compressed_dtype float32 in the context"
    ):
        check_identity(tmp_path / "a.ctx", there, here)


def test_it_is_asked_for_rightly():
    with pytest.raises(ValueError, match="kv_dtype must be auto, float32, bfloat16 or int8, got 'fp8'"):
        engine(kv_dtype="fp8")
    with pytest.raises(ValueError, match="kv_dtype float32 has more bits than bfloat16, which the model"):
        engine(model().bfloat16(), kv_dtype="float32")
    for kv_dtype in FEWER:
        with pytest.raises(ValueError, match=f"kv_dtype {kv_dtype} runs on a CPU only, .* is on meta"):
            engine(model().to("meta"), kv_dtype=kv_dtype)
    running = engine(model().bfloat16(), kv_dtype="int8")
    assert running.storage.kv[0].keys.dtype == torch.int8 and running.storage.kv[0].k1.dtype == torch.bfloat16


def test_what_is_so_anyway_is_no_other_form(tmp_path):
    """Bfloat16 for a model that computes in it: a context of either opens with the other."""
    of = model().bfloat16()
    Context.ingest(engine(of, kv_dtype="bfloat16"), documents(300), tmp_path / "a.ctx").close()
    with Context.open(engine(of), tmp_path / "a.ctx") as context:
        assert context.tokens
    of = model()
    Context.ingest(engine(of, kv_dtype="float32"), documents(300), tmp_path / "b.ctx").close()
    with Context.open(engine(of), tmp_path / "b.ctx") as context:
        assert context.tokens and context.manifest.kv_dtype == "float32"


@pytest.mark.parametrize("own", ["bfloat16", "float16", "float32"])
def test_of_a_bfloat16_checkpoint_they_are_kept_in_16_bits(own, tmp_path):
    """By `auto`, on every CPU: what a checkpoint has, and not what the processor is fast in."""
    folder = str(checkpoint(own, tmp_path))
    half = torch.bfloat16 if own == "bfloat16" else None
    bounds = EngineOptions(max_cached_tokens=2000)

    def kept(**options):
        return load_engine(folder, device="cpu", **({"options": bounds} | options)).kv_dtype

    def asked(name):
        return replace(bounds, kv_dtype=name)

    assert kept() == half and kept(options=asked("bfloat16")) == torch.bfloat16
    assert kept(options=asked("float32")) is None and kept(dtype="float32") is None
    assert kept(options=asked("int8")) == torch.int8 and kept(dtype="bfloat16") is None
    assert kept(context_kv_dtype="int8") == kept(dtype="float32", context_kv_dtype="int8") == torch.int8
    assert kept(context_kv_dtype="float32") is None and kept(context_kv_dtype="float16") == half
    assert (
        kept(context_kv_dtype="int8", options=asked("bfloat16")) == torch.bfloat16
    )  # what is asked for counts
    assert kept(dtype="bfloat16", context_kv_dtype="float32") is None  # opening says what differs


def checkpoint(dtype, folder):
    """A small model with a tokenizer, in a folder, in a dtype."""
    path = folder / dtype
    model().to(getattr(torch, dtype)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
