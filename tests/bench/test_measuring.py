"""The benchmark's own parts: quantiles, turns, rows, counts, and the refusal to time a wrong op."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opensala.bench import counts, verify
from opensala.bench.markdown import as_markdown
from opensala.bench.million import SPEC, random_lists
from opensala.bench.record import Report, Target
from opensala.bench.timing import Timing, quantiles, take_turns
from opensala.cli import main
from opensala.model import MiniCPMSALAForCausalLM
from opensala.ops import BlockSpec

from ..conftest import two_layer_config

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_quantiles():
    assert quantiles([3.0]) == Timing(3.0, 3.0, 3.0, 1)
    assert quantiles([float(n) for n in range(11)]) == Timing(2.0, 5.0, 8.0, 11)


def test_works_take_turns_and_the_first_call_of_each_is_not_counted():
    calls = []
    timings = take_turns(
        {name: lambda name=name: calls.append(name) for name in "ab"}, CPU, budget=60, most=3
    )
    assert calls == ["a", "b"] + ["a", "b"] * 3
    assert timings["a"].runs == timings["b"].runs == 3


def test_rows_are_appended_below_one_header_and_other_columns_are_refused(tmp_path):
    path = tmp_path / "deep" / "rows.csv"
    for n in range(2):
        report = Report(CPU)
        report.add(
            "op", "cpp", Timing(0.001, 0.002, 0.003, 5), shape=f"T={n}", flops=4e6, moved=8e6, peak=2**21
        )
        report.append_to(path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [r["shape"] for r in rows] == ["T=0", "T=1"]
    assert (rows[0]["p20_ms"], rows[0]["p50_ms"], rows[0]["gflops"], rows[0]["gbs"], rows[0]["peak_mib"]) == (
        "1.0",
        "2.0",
        "2.0",
        "4.0",
        "2",
    )
    assert rows[0]["torch"] == torch.__version__ and rows[0]["machine"] and rows[0]["threads"]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has the columns a, b"):
        report.append_to(path)


def test_targets_and_the_page():
    report = Report(CPU)
    report.add("matmul", "torch", Timing(1, 1, 1, 1), shape="x", flops=1e12)
    report.add("copy", "torch", Timing(1, 1, 1, 1), shape="x", moved=2e10)
    report.add("some_op", "cpp", Timing(1, 1, 1, 1), shape="y", flops=5e11, moved=2e9)
    report.targets += [Target.at_most("slow", 3.2, 3), Target.at_least("fast", 9, 8)]
    assert [t.ok for t in report.targets] == [False, True]
    page = as_markdown(json.loads(report.as_json()), "Title", "7 passed")
    assert "| slow | 3.2 | 3 | **missed** |" in page and "| fast | 9 | 8 | met |" in page
    assert "| some_op | forward | cpp | float32 | y | 1000 | 1000 to 1000 | 1 | 0.5 | 2 | 50% |" in page


@pytest.mark.parametrize("tokens", [5, 130, 700])
def test_counts_equal_counting_one_by_one(tokens):
    spec, heads, dim = BlockSpec(window_size=128, topk=3), 3, 8
    windows = sum(
        sum(start + size <= t + 1 for start in range(0, tokens, stride))
        for t in range(tokens)
        for size, stride in ((32, 16), (128, 64))
    )
    assert counts.selection_flops(tokens, heads, dim, spec) == 2 * heads * dim * windows
    keys = sum(min(t + 1, (spec.num_blocks - 1) * 64 + t % 64 + 1) for t in range(tokens))
    assert counts.sparse_flops(tokens, heads, dim, spec) == pytest.approx(4 * heads * dim * keys, rel=0.02)
    assert counts.dense_flops(tokens, heads, dim) == 4 * heads * dim * sum(t + 1 for t in range(tokens))


def test_prefill_counts_every_weight_of_the_layers():
    config = two_layer_config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        head_dim=16,
        lightning_nh=4,
        lightning_nkv=2,
        lightning_head_dim=8,
    )
    model = MiniCPMSALAForCausalLM(config)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n)
    tokens = 300
    rest = (
        counts.lightning_flops(tokens, 4, 8, 8)
        + counts.selection_flops(tokens, 2, 16, config.block_spec)
        + counts.sparse_flops(tokens, 2, 16, config.block_spec)
    )
    assert counts.prefill_flops(config, tokens) == 2 * tokens * matrices + 2 * 64 * 32 + rest


def test_random_lists_are_lists_that_selection_could_make():
    lists = random_lists(9000)[0, :, 0]
    assert lists.shape == (9000, SPEC.num_blocks)
    for t in (0, 63, 64, 700, 4000, 8999):
        row = lists[t][lists[t] >= 0].tolist()
        assert row == sorted(set(row)) and row[-1] == t // 64 and (lists[t][len(row) :] == -1).all()
        assert set(range(max(0, t // 64 - SPEC.window_blocks), t // 64 + 1)) <= set(row)


def test_right_ops_are_told_by_name_and_error():
    lines = verify.verify_ops(CPU, torch.float32, ("torch",))
    assert len(lines) == 5 and lines[0].startswith(
        "lightning_attention, torch: outputs and gradients within "
    )


@pytest.mark.parametrize(
    "op", ["lightning_attention", "sparse_attention", "select_blocks", "norm_rope", "norm_gate"]
)
def test_a_wrong_op_is_not_timed(op, monkeypatch):
    right = getattr(verify, op)
    monkeypatch.setattr(
        verify,
        op,
        lambda *args, backend, **options: _spoiled(
            op, right(*args, backend=backend, **options), args[0].dtype
        ),
    )
    with pytest.raises(ValueError, match=f"{op} is not timed"):
        verify.verify_ops(CPU, torch.float32, ("torch",))


def _spoiled(op, result, dtype):
    """What an op returns, slightly wrong unless it was asked in float64."""
    if dtype == torch.float64:
        return result
    if op == "select_blocks":
        return result.flip(-1)
    return (result[0] * 1.001, result[1]) if isinstance(result, tuple) else result * 1.001


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_make_gpu_says_what_is_missing():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA GPU" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "tpu"], "--device must be"),
        (["--device", "cuda"], "no CUDA GPU"),
        (["--fast"], "No such option"),
    ],
)
def test_bad_options_end_with_one_line(options, message, monkeypatch, capsys, tmp_path):
    if torch.cuda.is_available() and "cuda" in options:
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["opensala", "bench", "ops", *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
