"""Steps in passes, phases that end by time, runs that stop by the clock: the numbers are those of a plain
run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opensala.convert import convert
from opensala.convert.align import Alignment
from opensala.convert.compute import choose_compute
from opensala.convert.config import RECIPES, Execution, Phase, Probes
from opensala.convert.distill import Distillation, live_targets
from opensala.convert.ranks import Ranks
from opensala.convert.run import merge_outcome
from opensala.convert.teacher import load_teacher
from opensala.convert.tokens import Sample
from opensala.convert.transfer import assemble, lightning_mixers, student_config
from opensala.convert.work import Work
from opensala.engine import shipped_model
from opensala.ops.backends import backend_everywhere

from .test_run import losses, same_weights, saved
from .test_transfer import make_teacher

pytestmark = pytest.mark.usefixtures("one_thread")
PHASE = Phase(50, 5, 3e-3, 1e-4, warmup=2, answer_weight=2.0, cross_entropy=0.5)


def sample(rows=5, length=40):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 97, (rows, length), generator=g)
    return Sample(ids, torch.rand(rows, length, generator=g) > 0.8)


def lines(folder, phase):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["phase"] == phase]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_passes_add_up_to_the_step(tmp_path, rows):
    make_teacher(tmp_path)
    teacher = load_teacher(tmp_path)
    alignment = Alignment(teacher, lightning_mixers(teacher), PHASE)
    student = assemble(teacher, student_config(teacher.config, [0, 3]))
    distillation = Distillation(student, "all", live_targets(teacher), teacher.lm_head.weight, PHASE)
    for trainee, parameters in (
        (alignment, list(alignment.mixers.parameters())),
        (distillation, distillation.parameters),
    ):
        expected = trainee.step(0, sample(), 5)
        whole = [p.grad.clone() for p in parameters]
        trainee.forget()
        found = trainee.step(0, sample(), rows)
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-6)
        for p, gradient in zip(parameters, whole, strict=True):
            torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-3)


def test_a_run_stopped_by_the_clock_again_and_again_ends_like_one_that_was_not(config, tmp_path, capsys):
    config = replace(
        config, align=replace(config.align, steps=3), distill=replace(config.distill, steps=4), layers=(0, 7)
    )
    whole = convert(config, tmp_path / "whole", quiet=True).parent
    folder, stops = tmp_path / "run", 0
    tiny = Execution(seconds=1e-6)  # over behind the first step
    result = convert(config, folder, quiet=True, execution=tiny)
    while result == folder:
        stops += 1
        assert "the state is saved: go on with --resume" in capsys.readouterr().err
        result = convert(config, folder, resume=True, quiet=True, execution=tiny)
    assert stops == 5 and result == folder / "model"  # the last step of a phase is no reason to stop
    assert losses(folder) == losses(whole)
    same_weights(folder, whole)


def test_lines_recomputation_and_backend_change_nothing(config, tmp_path):
    whole = convert(config, tmp_path / "whole", quiet=True).parent
    seldom = Execution(log_every=5, recompute=True, backend=None)
    run = convert(config, tmp_path / "run", quiet=True, execution=seldom).parent
    assert [r["step"] for r in lines(run, "distill")] == [2, 4, 5, 7]  # also where a state is saved
    assert {k: v for k, v in losses(whole).items() if k in losses(run)} == losses(run)
    same_weights(run, whole)
    plain = convert(config, tmp_path / "torch", quiet=True, execution=Execution(backend="torch")).parent
    assert losses(plain)["distill", 7] == pytest.approx(losses(whole)["distill", 7], rel=1e-3)
    with pytest.raises(ValueError, match="backend 'cuda' is not one of"):
        convert(config, tmp_path / "no", quiet=True, execution=Execution(backend="cuda"))


def test_a_phase_ends_by_its_time_with_its_rate_fallen(config, tmp_path):
    config = replace(config, distill=replace(config.distill, steps=10**6, warmup=0, seconds=1.5))
    folder = convert(config, tmp_path / "run", quiet=True).parent
    rates = [r["lr"] for r in lines(folder, "distill")]
    assert 3 < len(rates) < 10**4 and rates == sorted(rates, reverse=True)
    assert rates[0] == 1e-3 and rates[-1] == pytest.approx(1e-4, rel=1e-6)
    assert convert(config, folder, resume=True, quiet=True) == folder / "model"


def test_the_log_says_how_fast_and_how_well(config, tmp_path):
    config = replace(config, validate_every=4, distill=replace(config.distill, steps=22))
    folder = convert(config, tmp_path / "run", quiet=True).parent
    found = lines(folder, "distill")
    assert [r["step"] for r in found if "valid" in r] == [3, 7, 11, 15, 19, 21]
    assert set(found[3]["valid"]) == {"recall", "nll", "kl"} and found[3]["valid"] != found[21]["valid"]
    assert all(r["tokens_per_second"] > 0 and 0 < r["mfu"] < 1.5 for r in found)


def test_rotary_positions_fade_out(config, tmp_path, monkeypatch):
    """All there at the first step, half of the angle half-way, none at the end and in what is saved."""
    original, seen = Distillation.step, []

    def watched(self, step, sample, rows):
        seen.append(self.student.model.layers[0].self_attn.rope_share)
        return original(self, step, sample, rows)

    monkeypatch.setattr(Distillation, "step", watched)
    config = replace(config, hype_fade=4 * 2 * 128, layers=(0, 7))
    folder = convert(config, tmp_path / "run", quiet=True).parent
    assert seen == [1.0, 0.75, 0.5, 0.25, None, None, None, None]
    assert not json.loads((folder / "model" / "config.json").read_text())["attn_use_rope"]


def test_all_of_the_rotation_is_what_the_teacher_has(tmp_path):
    make_teacher(tmp_path, "llama")
    teacher = load_teacher(tmp_path)
    ids = sample().ids
    with torch.no_grad():
        faded = assemble(teacher, student_config(teacher.config, range(4)))
        for layer in faded.model.layers:
            layer.self_attn.rope_share = 1.0
        expected = teacher.model.read_whole(ids)
        torch.testing.assert_close(faded.model.read_whole(ids), expected, atol=1e-5, rtol=1e-5)
        for layer in faded.model.layers:
            layer.self_attn.rope_share = 0.5
        assert not torch.allclose(faded.model.read_whole(ids), expected, atol=1e-2)


def test_products_in_bfloat16(config, tmp_path):
    """Weights stay float32; losses are near those of float32. What `auto` chose is what a resumed run
    takes."""
    exact = convert(config, tmp_path / "exact", quiet=True).parent
    low = convert(replace(config, compute="bfloat16"), tmp_path / "low", quiet=True).parent
    for key, value in losses(exact).items():
        if key[0] == "distill":
            assert losses(low)[key] == pytest.approx(value, rel=0.15)
    assert losses(low) != losses(exact)
    assert {x.dtype for x in saved(low, "distill").values()} == {torch.float32}
    assert choose_compute("auto", torch.device("cpu"), 64, 96) in ("float32", "bfloat16")
    auto = replace(config, compute="auto", distill=replace(config.distill, steps=0))
    convert(auto, tmp_path / "auto", quiet=True, execution=Execution(seconds=1e-6))
    (tmp_path / "auto" / "compute.json").write_text('"bfloat16"')
    work = Work(auto, tmp_path / "auto", True, True, Execution(), Ranks())
    work.load()
    assert work.compute == "bfloat16"
    work.folder.close()


@pytest.fixture
def smollm2(tmp_path):
    """The recipe with everything it does, a thousandth of its size, and a random teacher of its family."""
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    make_teacher(
        tmp_path / "teacher",
        "llama",
        vocab_size=len(tokenizer),
        num_hidden_layers=6,
        hidden_size=48,
        num_attention_heads=6,
        tie_word_embeddings=True,
    )
    tokenizer.save_pretrained(tmp_path / "teacher")
    generator = np.random.default_rng(0)
    np.save(tmp_path / "text.npy", generator.integers(3, 2000, 60_000).astype(np.uint16))
    base = RECIPES["smollm2_135m"](str(tmp_path / "teacher"))
    return replace(
        base,
        layers=(0, 3, 5),
        lightning_nkv=2,
        tokens=(str(tmp_path / "text.npy"),),
        calibrate_tokens=2048,
        align=replace(base.align, steps=4, batch=2, length=128, seconds=None),
        distill=replace(base.distill, steps=6, batch=2, length=256, warmup=1, seconds=None),
        long=replace(base.long, steps=2, batch=2, length=512, warmup=1, seconds=None),
        sparse_config={"dense_len": 512, "topk": 2, "window_size": 64, "block_size": 32},
        probes=Probes(128, 2, 2),
        validate_every=3,
        compute="float32",
        lora_rank=4,
    )


def test_the_recipe_of_smollm2_from_tokens_to_outcome(smollm2, tmp_path):
    folder = convert(smollm2, tmp_path / "run", quiet=True, execution=Execution(micro_tokens=512)).parent
    assert [phase for phase, _ in losses(folder)] == ["align"] * 4 + ["distill"] * 6 + ["long"] * 2
    result = json.loads((folder / "result.json").read_text())
    assert set(result) == {"teacher", "aligned", "distilled"}
    for name in ("calibration", "calibration_aligned"):
        errors = json.loads((folder / f"{name}.json").read_text())
        assert len(errors["before"]) == 6 and sum(errors["after"]) <= sum(errors["before"])
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.lightning_nkv == 2 and model.config.dense_len == 512
    ids = torch.arange(60)[None] * 31 % 2000
    merged = merge_outcome(smollm2.teacher, folder / "outcome", tmp_path / "merged")
    with torch.no_grad():
        teacher = AutoModelForCausalLM.from_pretrained(smollm2.teacher)(ids).logits
        expected = model(ids).logits
        again = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    assert (again - expected).norm() < 0.02 * (expected - teacher).norm()
    with pytest.raises(ValueError, match="is not empty"):
        merge_outcome(smollm2.teacher, folder / "outcome", tmp_path / "merged")


def test_stages_are_resumed_between_and_within(smollm2, tmp_path):
    short = replace(
        smollm2,
        align=replace(smollm2.align, steps=2),
        distill=replace(smollm2.distill, steps=2),
        calibrate_tokens=512,
    )
    whole = convert(short, tmp_path / "whole", quiet=True).parent
    folder, results = tmp_path / "run", []
    for begun in (False, True, True, True):  # behind the first step of each phase, then to the end
        results.append(convert(short, folder, resume=begun, quiet=True, execution=Execution(seconds=1e-6)))
        assert (folder / "outcome" / "outcome.json").exists() == (len(results) > 1)  # of a stopped one too
    assert results == [folder] * 3 + [folder / "model"]
    assert losses(folder) == losses(whole)
    same_weights(folder, whole)


def test_sequences_beyond_the_teacher_teach_by_their_answers(smollm2, tmp_path):
    blind = replace(smollm2, long=replace(smollm2.long, teacher_length=256, task_share=1.0))
    folder = convert(blind, tmp_path / "run", quiet=True).parent
    assert all(r["loss"] > 1 for r in lines(folder, "long"))  # nats of an answer's token, not a divergence
    with pytest.raises(ValueError, match="only answers can teach: set long.cross_entropy above 0"):
        replace(smollm2, long=replace(blind.long, cross_entropy=0.0)).check()


def test_budgets_in_tokens():
    phase = Phase(1, 64, 1e-3, 1e-4, length=1024)
    assert phase.for_tokens(40_000_000, 512, "distill").steps == 610
    message = r"distill.tokens must be at least a batch of 64 sequences .* 65,536, got 65,535"
    with pytest.raises(ValueError, match=message):
        phase.for_tokens(65_535, 512, "distill")


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_autocast_leaves_the_attentions_in_their_own_precision(tmp_path, backend, mode):
    """What ops compute in float32 on purpose stays so, in the backward pass too, whatever runs them."""
    make_teacher(tmp_path, "llama", num_attention_heads=8, hidden_size=80)
    teacher = load_teacher(tmp_path)
    sizes = {"dense_len": 16, "topk": 2, "window_size": 16, "block_size": 16}
    config = student_config(teacher.config, [0, 3], lightning_nkv=2, sparse_config=sizes)
    student = assemble(teacher, config)
    student.set_attention_mode(mode)
    found = {}
    for compute in ("float32", "bfloat16"):
        distillation = Distillation(
            student, "all", live_targets(teacher), teacher.lm_head.weight, PHASE, compute=compute
        )
        with backend_everywhere(backend):
            distillation.step(0, sample(length=64), 5)
        found[compute] = torch.cat([p.grad.flatten() for p in distillation.parameters])
        distillation.forget()
    exact, low = found["float32"], found["bfloat16"]
    assert 0 < (low - exact).norm() < 0.1 * exact.norm()
