"""What the processes of a group do: the same work as one process, in parts, and by how much the results
differ.

Differences are relative to the largest element of what one process computes.
"""

import os

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, linear

from opensala.ops import alibi_slopes, lightning_attention
from opensala.parallel import (
    ParallelConfig,
    average_gradients,
    clip_gradients,
    context_parallel,
    context_volume,
    exchange,
    init_parallel,
    on_whole_weights,
    shard_model,
    shard_sequence,
    share_of_loss,
    total_over_ranks,
    whole_weights,
)
from opensala.parallel.exchange import gather_tokens, state_before

from ..conftest import tiny_model
from .group import report

LENGTH = 320  # tokens a row; borders between 4 ranks at 80, 160, 240
PACKED = [
    0,
    37,
    80,
    90,
    300,
    320,
]  # a border that is a boundary, documents inside a rank, one over three ranks
AT_BORDERS = [0, 160, 240, 250, 320]


def rows(count, seed, bounds=None):
    """`count` rows with labels and weights that leave ranks very different numbers of targets."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (count, LENGTH), generator=g)
    labels, weights = ids.clone(), torch.rand(count, LENGTH, generator=g)
    labels[:, 10:60], labels[0, 64:120] = -100, -100
    batch = {"input_ids": ids, "labels": labels, "weights": weights}
    return batch if bounds is None else batch | {"cu_seqlens": torch.tensor(bounds)}


def loss_sum(model, batch):
    """Weighted sum of losses, by the plain formula."""
    logits = model(batch["input_ids"], cu_seqlens=batch.get("cu_seqlens"), use_cache=False).logits
    losses = cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return (losses * batch["weights"][:, 1:].flatten()).sum()


def weight_sum(batch):
    return (batch["weights"] * (batch["labels"] != -100))[:, 1:].double().sum()


def one_process(model, batches):
    """Loss and gradients of the mean over all batches."""
    loss = sum(loss_sum(model, b) for b in batches) / sum(weight_sum(b) for b in batches)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@torch.no_grad()
def whole_logits(model, batch, mode):
    model.set_attention_mode(mode)
    return model(batch["input_ids"], cu_seqlens=batch.get("cu_seqlens"), use_cache=False).logits


def sharded_loss_sum(model, part):
    part = dict(part)
    targets, weights = part.pop("targets"), part.pop("weights")
    logits = model(**part, use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return (losses * weights.flatten()).sum()


def head_alone(model, part):
    """The same with the head's weight used outside of the model's forward, as a loss in chunks does."""
    part = dict(part)
    targets, weights = part.pop("targets"), part.pop("weights")
    hidden = model.model(**part, use_cache=False).last_hidden_state / model.config.logit_divisor
    losses = cross_entropy(
        linear(hidden, model.lm_head.weight).flatten(0, 1),
        targets.flatten(),
        ignore_index=-100,
        reduction="none",
    )
    return (losses * weights.flatten()).sum()


def backward(model, batch, mesh, function=sharded_loss_sum):
    """This rank's part of the mean loss over all ranks; returns that mean."""
    part = shard_sequence(batch, mesh)
    tokens = total_over_ranks(part["weights"].double().sum(), mesh)
    total = function(model, part)
    share_of_loss(total, tokens, mesh).backward()
    return total_over_ranks(total, mesh) / tokens


def difference(got, wanted):
    got = got.full_tensor() if isinstance(got, DTensor) else got
    gap = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)
    return gap.nan_to_num(nan=torch.inf).item()  # max() would pass over a NaN


CASES = {  # name: (dp, cp, sharded, dtype, boundaries, rows, mode, options)
    "fsdp": (4, 1, True, "float32", None, 1, "sparse", {}),
    "fsdp packed": (4, 1, True, "float64", PACKED, 1, "auto", {}),
    "cp": (1, 4, False, "float32", None, 1, "sparse", {}),
    "cp exact": (1, 4, False, "float64", None, 1, "sparse", {"lightning_nh": 6, "lightning_nkv": 2}),
    "cp dense": (1, 4, False, "float64", None, 2, "dense", {}),
    "cp packed": (
        1,
        4,
        False,
        "float64",
        PACKED,
        1,
        "sparse",
        {"attn_use_rope": True, "attn_scale_base": 500},
    ),
    "cp packed auto": (1, 4, True, "float32", PACKED, 1, "auto", {}),
    "cp packed at borders": (1, 4, True, "float64", AT_BORDERS, 1, "sparse", {}),
    "cp documents inside": (1, 4, False, "float64", [0, 80, 160, 240, 320], 1, "sparse", {}),
    "both": (2, 2, True, "float32", None, 2, "sparse", {"tie_word_embeddings": True}),
    "both packed": (2, 2, True, "float64", PACKED, 1, "auto", {}),
    "both dense": (2, 2, True, "float32", PACKED, 1, "dense", {"attention_bias": True, "attn_qk_norm": True}),
    "both checkpointing": (2, 2, True, "float64", PACKED, 1, "sparse", {}),
    "both head alone": (2, 2, True, "float64", None, 1, "sparse", {}),
}


def equality(name):
    """Loss and every gradient of a case against one process."""
    dp, cp, sharded, dtype, bounds, count, mode, options = CASES[name]
    mesh = init_parallel(ParallelConfig(dp, cp), device="cpu")
    batches = [rows(count, 100 * len(name) + n, bounds) for n in range(dp)]
    model = context_parallel(
        tiny_model(seed=len(name), attention_mode=mode, **options).to(getattr(torch, dtype)).train(), mesh
    )
    model = shard_model(model, mesh) if sharded else model
    if "checkpointing" in name:
        model.gradient_checkpointing_enable()
    function = on_whole_weights(model, head_alone) if "head alone" in name else None
    loss = backward(
        model, batches[mesh.dp_rank], mesh, (lambda m, part: function(part)) if function else sharded_loss_sum
    )
    if not sharded:
        average_gradients(model, mesh)
    got = {n: p.grad.full_tensor() if sharded else p.grad for n, p in model.named_parameters()}
    if mesh.rank:  # one is enough to compute what is wanted
        return None
    whole = tiny_model(seed=len(name), attention_mode=mode, **options).to(getattr(torch, dtype)).train()
    wanted_loss, wanted = one_process(whole, batches)
    gaps = {n: difference(x, wanted[n]) for n, x in got.items()}
    worst = max(gaps, key=gaps.get)
    left_out = difference(*(whole_logits(whole, batches[0], m) for m in ("dense", mode)))
    return {
        "loss": abs(loss - wanted_loss) / wanted_loss,
        "gradient": gaps[worst],
        "worst": worst,
        "parameters": len(gaps),
        "left out": left_out,
    }


def scan_alone(bounds, slopes=None):
    """Lightning attention over 4 ranks against one, and its gradients, in float64; keys in tiles that do not
    divide."""
    mesh = init_parallel(ParallelConfig(1, 4), device="cpu")
    g = torch.Generator().manual_seed(len(bounds))
    whole = [torch.randn(1, LENGTH, 6, d, dtype=torch.float64, generator=g) for d in (8, 8, 5, 5)]
    slopes = slopes or alibi_slopes(6)
    decay = torch.tensor(slopes)
    leaves = [x.clone().requires_grad_() for x in whole[:3]]
    o, _ = lightning_attention(*leaves, decay, cu_seqlens=torch.tensor(bounds))
    wanted = torch.autograd.grad((o * whole[3]).sum(), leaves)
    part = LENGTH // 4
    first, end = mesh.cp_rank * part, (mesh.cp_rank + 1) * part
    here = [a for a in bounds if first < a < end]
    local = torch.tensor([0, *(a - first for a in here), part])
    reach = tuple(-(-(a - max(b for b in bounds if b <= a)) // part) for a in range(0, LENGTH, part))
    own = [x[:, first:end].clone().requires_grad_() for x in whole[:3]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "TILE", 13)
        state = state_before(own[1], own[2], slopes, int(local[-1] - local[-2]), reach, part, mesh.cp_group)
        state = torch.cat([state, state.new_zeros(len(local) - 2, *state.shape[1:])])
        mine, _ = lightning_attention(*own, decay, initial_state=state, cu_seqlens=local)
        got = torch.autograd.grad((mine * whole[3][:, first:end]).sum(), own)
    gaps = [
        difference(mine, o.detach()[:, first:end]),
        *(difference(a, b[:, first:end]) for a, b in zip(got, wanted, strict=True)),
    ]
    return {"worst": total_over_ranks(max(gaps), mesh)}


def gather_alone():
    """Keys of all ranks in order, for two rows; their gradients are sums over ranks, taken in float32."""
    mesh = init_parallel(ParallelConfig(1, 4), device="cpu")
    whole = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(1))
    own = whole[:, 5 * mesh.cp_rank : 5 * mesh.cp_rank + 5].clone().requires_grad_()
    got = gather_tokens(own, mesh.cp_group)
    (got * (mesh.cp_rank + 1)).sum().backward()
    half = torch.zeros(1, 4, 1, dtype=torch.bfloat16, requires_grad=True)
    # 1 + 3 * 2^-9 rounds to 1.0078 in bf16 if it is added up first; each of the three would be lost if
    # it met the 1 alone. In what order ranks are added is not ours: each of them has the 1 for some
    # token.
    shares = torch.where(torch.arange(16) % 4 == mesh.cp_rank, 1.0, 2.0**-9)
    gather_tokens(half, mesh.cp_group).flatten().mul(shares).sum().backward()
    exact = total_over_ranks((half.grad == 1.0078125).sum(), mesh)
    return {
        "values": difference(got.detach(), whole),
        "gradient": difference(own.grad, torch.full_like(own, 10.0)),
        "half": exact,
    }


def batch_alone():
    """A batch put together again from the parts of all ranks: targets shifted over their borders, positions,
    boundaries."""
    mesh = init_parallel(ParallelConfig(1, 4), device="cpu")
    batch = rows(1, 4)
    starts = torch.cat([torch.arange(b - a) for a, b in zip(PACKED, PACKED[1:], strict=False)])[None]
    shifted = torch.cat([batch["labels"][:, 1:], torch.full((1, 1), -100)], 1)
    by_labels = shard_sequence({**batch, "position_ids": starts}, mesh)
    weights = torch.cat([batch["weights"][:, 1:], torch.zeros(1, 1)], 1)
    by_targets = shard_sequence(
        {
            "input_ids": batch["input_ids"],
            "targets": shifted,
            "weights": weights,
            "cu_seqlens": torch.tensor(PACKED),
        },
        mesh,
    )
    wanted = {
        "input_ids": batch["input_ids"],
        "targets": shifted,
        "weights": weights * (shifted != -100),
        "position_ids": starts,
    }
    same = [
        torch.equal(gather_tokens(part[name], mesh.cp_group), x)
        for part in (by_labels, by_targets)
        for name, x in wanted.items()
    ]
    plain = shard_sequence({"input_ids": batch["input_ids"].expand(2, -1)}, mesh)  # every token a target
    same += [torch.equal(part["cu_seqlens"], torch.tensor(PACKED)) for part in (by_labels, by_targets)]
    return {
        "same": all(same),
        "targets": total_over_ranks(plain["weights"].sum(), mesh),
        "keys": sorted(plain),
    }


def half_precision():
    """Activations in bf16; shards, gradients and their sums in float32."""
    mesh = init_parallel(ParallelConfig(2, 2), device="cpu")
    batches = [rows(1, n, PACKED) for n in range(2)]
    wanted, _ = one_process(tiny_model().train(), batches)
    model = shard_model(context_parallel(tiny_model().train(), mesh), mesh, compute_dtype=torch.bfloat16)
    seen = []
    model.model.layers[0].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    loss = backward(model, batches[mesh.dp_rank], mesh)
    norm = clip_gradients(model, 0.5)
    after = clip_gradients(model, 1e9)
    dtypes = {p.grad.dtype for p in model.parameters()}
    model.zero_grad()
    # as in gather_alone: in bf16, 1 and three times 2^-9 would not add up to this
    shares = torch.where(torch.arange(32) % 4 == mesh.rank, 1.0, 2.0**-9).bfloat16()
    on_whole_weights(model, lambda m: (m.lm_head.weight * shares).sum())().backward()
    exact = difference(model.lm_head.weight.grad, torch.full((97, 32), (1 + 3 * 2.0**-9) / 4))
    return {
        "loss": abs(loss - wanted) / wanted,
        "seen": str(seen[0]),
        "gradients": str(dtypes),
        "shards": sum(p.to_local().numel() for p in model.parameters()),
        "norm": norm,
        "after": after,
        "exact": exact,
        "whole": sum(p.numel() for p in tiny_model().parameters()),
        "named": len(whole_weights(model)),
    }


def bad_input():
    """Every rank must refuse, or the others would wait for it: the messages, as rank 0 sees them."""
    mesh = init_parallel(ParallelConfig(1, 4), device="cpu")
    model = context_parallel(tiny_model(), mesh)
    batch = rows(1, 0)
    part = shard_sequence(batch, mesh)
    trials = {
        "length": lambda: shard_sequence({"input_ids": batch["input_ids"][:, :250]}, mesh),
        "key": lambda: shard_sequence({**batch, "label": batch["labels"]}, mesh),
        "shape": lambda: shard_sequence({**batch, "weights": batch["weights"][:, 1:]}, mesh),
        "different": lambda: shard_sequence(rows(1, seed=mesh.rank // 3), mesh),
        "documents": lambda: shard_sequence(rows(1, 0, [0, 9 + mesh.rank % 2, LENGTH]), mesh),
        "world": lambda: init_parallel(ParallelConfig(2, 4), device="cpu"),
        "cp": lambda: init_parallel(ParallelConfig(cp=3), device="cpu"),
        "labels": lambda: model(part["input_ids"], labels=part["input_ids"], use_cache=False),
        "cache": lambda: model(part["input_ids"], use_cache=True),
        "mask": lambda: model(part["input_ids"], attention_mask=torch.ones(1, 80), use_cache=False),
        "tokens": lambda: share_of_loss(torch.zeros(()), 0.0, mesh),
        "model": lambda: context_parallel(torch.nn.Linear(2, 2), mesh),
    }
    said = {}
    for name, trial in trials.items():
        with pytest.raises(ValueError) as caught:
            trial()
        said[name] = str(caught.value)
    return said


def traffic():
    """Bytes received by a collective of each kind, counted while a step runs, against `context_volume`."""
    mesh = init_parallel(ParallelConfig(1, 4), device="cpu")
    model = context_parallel(tiny_model(attention_mode="sparse").train(), mesh)
    real = exchange.all_gather, exchange.reduce_scatter
    counted = 0

    def gather(out, x, group=None):
        nonlocal counted
        counted += (out.numel() - x.numel()) * x.element_size() * (group is mesh.cp_group)
        return real[0](out, x, group=group)

    def scatter(out, x, group=None):
        nonlocal counted
        counted += (x.numel() - out.numel()) * x.element_size() * (group is mesh.cp_group)
        return real[1](out, x, group=group)

    part = shard_sequence(rows(1, 0), mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "all_gather", gather)
        patch.setattr(exchange, "reduce_scatter", scatter)
        sharded_loss_sum(model, part).backward()
    return {"counted": counted, "wanted": context_volume(model.config, 4, LENGTH, element_bytes=4).step}


def run_all(folder, jobs):
    """Run (name, function, arguments) one after the other and report what each returns."""
    for name, function, *args in jobs:
        result = function(*args)
        if int(os.environ["RANK"]) == 0:
            report(folder, name, result)
