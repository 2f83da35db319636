"""Any value in any field: a tiny model with finite logits, or one ValueError that names the field; through
the constructor, and through a config.json with the engine."""

import json
import math
import random
import resource
import shutil
import time

import pytest
import torch

from opensala import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from opensala.engine import load_engine, shipped_model
from opensala.model.fields import RULES, SPARSE_RULES

from ..conftest import tiny_config

SEED = 20261125
ODD = [
    None,
    True,
    False,
    "x",
    "",
    "false",
    "1",
    -1,
    -2.5,
    0,
    0.0,
    0.5,
    1,
    3,
    1e-300,
    1e308,
    10**12,
    10**40,
    math.nan,
    math.inf,
    -math.inf,
    [],
    [1, "x"],
    ["minicpm4"],
    {},
    {"x": 1},
    {"rope_type": None},
]
GOOD = {
    "vocab_size": [3, 64],
    "hidden_size": [4, 48],
    "intermediate_size": [1, 33],
    "num_attention_heads": [2, 6],
    "num_key_value_heads": [1, 4],
    "head_dim": [2, 12],
    "lightning_nh": [8],
    "lightning_nkv": [1, 2],
    "lightning_head_dim": [2, 6],
    "hidden_act": ["gelu", "relu"],
    "lightning_scale": ["1/d", 2],
    "rms_norm_eps": [1e-30, 1],
    "rope_theta": [1, 1e15],
    "scale_emb": [1e-6, 1e6],
    "scale_depth": [1e-6, 1e6],
    "dim_model_base": [1e-6, 1e9],
    "initializer_range": [0, 100],
    "dtype": ["float32", "float16"],
    "rope_scaling": [{"rope_type": "linear", "factor": 1e-3}, {"type": "linear", "factor": math.nan}],
    "attention_mode": ["dense", "sparse", "spars"],
    "block_search": ["hierarchical", 3],
    "eos_token_id": [[1, 2], 97],
    "sparse_config.kernel_size": [1, 16],
    "sparse_config.kernel_stride": [1, 16],
    "sparse_config.block_size": [8, 32],
    "sparse_config.topk": [2, 2000],
    "sparse_config.window_size": [0, 160],
    "sparse_config.lse": ["exact", 3],
}


def cases():
    """(field, value): four odd values for each field and key, and what GOOD has."""
    rng = random.Random(SEED)
    fields = [*RULES, "attention_mode", "block_search", *(f"sparse_config.{key}" for key in SPARSE_RULES)]
    for field in fields:
        yield from ((field, value) for value in rng.sample(ODD, 4))
    yield from ((field, value) for field, values in GOOD.items() for value in values)


def changed(record, field, value):
    """A config.json's fields with one of them, or one key of sparse_config, replaced."""
    name, _, key = field.partition(".")
    return record | {name: (record[name] | {key: value}) if key else value}


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_model() / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def record():
    return json.loads(tiny_config().to_json_string(use_diff=True))


def logits(model):
    """Of 100 tokens in the model's vocabulary: above dense_len and the blocks of the window."""
    ids = torch.arange(100)[None] * 31 % model.config.vocab_size
    with torch.no_grad():
        return model(ids).logits


def attempt(build):
    """The result, or the one ValueError; it takes no gigabytes and no second of the processor."""
    start = time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        return build(), None
    except ValueError as error:
        return None, error
    finally:
        assert time.process_time() - start < 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB: half a GiB


def check_refusal(error, field):
    text = str(error)
    assert field in text or field.partition(".")[2] in text.split("sparse_config.")[-1], text
    assert "\n" not in text and len(text) < 600


@pytest.mark.parametrize(("field", "value"), cases(), ids=lambda v: str(v)[:24])
def test_any_value_is_finite_or_refused_by_name(record, tokenizer_files, tmp_path, field, value):
    given = changed(record, field, value)
    torch.manual_seed(0)
    model, error = attempt(lambda: MiniCPMSALAForCausalLM(MiniCPMSALAConfig(**given)).eval())
    if error is None:
        assert torch.isfinite(attempt(lambda: logits(model))[0]).all()
        model.save_pretrained(tmp_path)
    else:
        check_refusal(error, field)
        given |= {"model_type": "minicpm_sala", "architectures": ["MiniCPMSALAForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(given))
    shutil.copytree(tokenizer_files, tmp_path, dirs_exist_ok=True)
    engine, again = attempt(lambda: load_engine(str(tmp_path), device="cpu", dtype="float32"))
    if error is None:
        assert again is None and torch.isfinite(logits(engine.model)).all()
    else:
        check_refusal(again, field)


def test_there_are_cases_for_every_field():
    found = list(cases())
    assert len(found) >= 120
    own = set(MiniCPMSALAConfig.__annotations__) - {"model_type", "keys_to_ignore_at_inference"}
    assert own <= {field for field, _ in found}
