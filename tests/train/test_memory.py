"""The memory said before a stage, against what a pass really keeps; and bfloat16 passes on float32
masters."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from opensala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from opensala.parallel import ParallelConfig, close_parallel, init_parallel
from opensala.train.memory import training_memory
from opensala.train.pipeline import SHIPPED, train
from opensala.train.recipes import tiny
from opensala.train.start import Start
from opensala.train.steps import _row_loss
from opensala.train.trainer import StageRun, prepared

from .conftest import mini


def kept_bytes(model, stage, tokens):
    """Bytes that autograd keeps of one forward pass, weights left out."""
    storages = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    ids = torch.randint(0, 2000, (1, tokens))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = _row_loss(model, input_ids=ids, targets=ids)
    assert loss.requires_grad
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("recompute,low,high", [(False, 0.6, 1.7), (True, 0.3, 1.7)])
def test_activations_are_estimated_within_a_factor(recompute, low, high):
    recipe = replace(tiny(), recompute=recompute)
    stage = replace(recipe.stage("long_decay_2k"), batch_tokens=2048)
    model = MiniCPMSALAForCausalLM(MiniCPMSALAConfig(**recipe.model))
    mesh = init_parallel(ParallelConfig(), device="cpu")
    model = prepared(model, recipe, stage, mesh)
    close_parallel()
    need = training_memory(model.config, replace(recipe, micro_tokens=2048), stage)
    kept = kept_bytes(model, stage, 2048)
    if recompute:  # what one layer needs at once comes on top when it is recomputed
        one = (
            training_memory(
                model.config, replace(recipe, micro_tokens=2048, recompute=False), stage
            ).activations
            // 12
        )
        kept += one
    estimate = need.activations + 4 * 2048 * 96 + 4 * 2048 * 96
    assert low < kept / estimate < high, (kept, estimate)
    weights = sum(p.numel() for p in model.parameters())
    assert need.states == pytest.approx(16 * weights, rel=0.02)  # weight, gradient, two moments


def test_bfloat16_passes_update_float32_masters(corpus, tmp_path):
    """A rate so small that a bfloat16 weight would never move; and the checkpoint holds the masters."""
    recipe = replace(mini(corpus), dtype="bfloat16", probe_tokens=0)
    model = MiniCPMSALAForCausalLM(MiniCPMSALAConfig(**{**recipe.model, "initializer_range": 0.3}))
    model.save_pretrained(tmp_path / "init")
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(tmp_path / "init")
    seen, original = {}, StageRun._take

    def look(self, batch):
        record = original(self, batch)
        seen[self.step] = {
            n: p.full_tensor().clone() if isinstance(p, DTensor) else p.detach().clone()
            for n, p in self.model.named_parameters()
        }
        seen["layer"] = self.model.model.layers[0].mlp.up_proj.weight.dtype
        return record

    StageRun._take = look
    slow = replace(
        recipe.stage("stable"), schedule=replace(recipe.stage("stable").schedule, peak=1e-5, last=1e-5)
    )
    recipe = replace(recipe, stages=(slow,))
    try:
        train(recipe, tmp_path / "run", start=Start(init=str(tmp_path / "init")), device="cpu", quiet=True)
    finally:
        StageRun._take = original
    name = "model.layers.0.mlp.up_proj.weight"
    assert seen["layer"] == torch.float32
    first = load_file(tmp_path / "init" / "model.safetensors")[name]
    assert (seen[4][name] - first).abs().mean() > 1e-6
    assert (seen[4][name].bfloat16() == first.bfloat16()).float().mean() > 0.9
    exported = load_file(tmp_path / "run" / "models" / "stable" / "model.safetensors")
    assert exported[name].dtype == torch.bfloat16 and torch.equal(exported[name], seen[4][name].bfloat16())
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(5 < loss < 15 for loss in losses)
