"""transformers is a guest: what the model takes from it and overrides is public, and the rest is listed
here."""

import ast
from pathlib import Path

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache

import opensala
from opensala import MiniCPMSALAForCausalLM, SALACache
from opensala.model.compat import CACHE_ARGUMENT, CACHE_NAMES

from ..conftest import tiny_model
from .test_equality import tokens

PACKAGE = Path(opensala.__file__).parent
# Class attributes by which transformers asks its models to describe themselves; each is tested where it
# matters.
DESCRIPTIONS = {
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_keys_to_ignore_on_load_unexpected",
    "_tied_weights_keys",
}


def test_nothing_private_of_transformers_is_imported():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                private = [a.name for a in node.names if a.name.startswith("_")]
                assert not private and "._" not in node.module, f"{file}: {node.module} {private}"


def test_no_private_method_of_transformers_is_overridden():
    theirs = {name for name in {**vars(PreTrainedModel), **vars(GenerationMixin)} if name.startswith("_")}
    for kind in MiniCPMSALAForCausalLM.__mro__:
        if kind.__module__.startswith("opensala"):
            ours = {name for name in vars(kind) if name.startswith("_") and not name.startswith("__")}
            assert ours & theirs <= DESCRIPTIONS, f"{kind.__name__} overrides {ours & theirs - DESCRIPTIONS}"
    theirs = {name for name in vars(Cache) if name.startswith("_") and not name.startswith("__")}
    assert not theirs & set(vars(SALACache))


def test_the_cache_goes_by_the_name_that_this_version_uses():
    model, seen = tiny_model(), set()
    forward = type(model).forward

    def spy(self, *args, **kwargs):
        seen.update(name for name in CACHE_NAMES if kwargs.get(name) is not None)
        return forward(self, *args, **kwargs)

    try:
        type(model).forward = spy
        model.generate(tokens(10), max_new_tokens=3)
    finally:
        type(model).forward = forward
    assert seen == {CACHE_ARGUMENT}


def test_a_loaded_model_is_whole_and_tied(tmp_path):
    """What the class attributes are for: tied weights are one tensor, constants of old checkpoints are left
    out."""
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    again = MiniCPMSALAForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(again(tokens(20)).logits, model(tokens(20)).logits)
