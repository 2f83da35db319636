"""The run on a GPU, rehearsed: the whole of it at tiny sizes in Triton's interpreter, and what it does when
steps fail, hang, or no longer fit. Nothing but the hardware is new on the day."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from opensala.bench import verify
from opensala.bench.gpu import dense, kernels
from opensala.bench.gpu import tests as gpu_tests
from opensala.bench.gpu.device import Rehearsal
from opensala.bench.gpu.ledger import PAGE
from opensala.bench.gpu.outcome import result_of, targets
from opensala.bench.gpu.plan import all_steps, groups_of
from opensala.bench.gpu.sizes import TINY, Sizes, released_config
from opensala.bench.gpu.steps import (
    GROUPS,
    OPTIONAL,
    Context,
    Live,
    Step,
    group_ends,
    read_events,
    run_steps,
)
from opensala.bench.timing import Timing
from opensala.model import MiniCPMSALAForCausalLM
from opensala.ops import BlockSpec, select_blocks
from opensala.ops.sparse.naive import naive_block_scores, naive_compress_keys

ROOT = Path(__file__).parents[2]


def gpu_script():
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "scripts" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_whole_run_in_the_interpreter(tmp_path):
    """`make gpu` at tiny sizes: every step of the usual groups begins and ends, rows, page, ledger and files
    are there."""
    command = [sys.executable, ROOT / "scripts" / "gpu.py", "--rehearse", "--output", tmp_path]
    done = subprocess.run(
        [*command, "--seconds", "3000"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    (path,) = (tmp_path / "reports").glob("*.jsonl")
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) <= 7
    events = read_events(path)
    wanted = [s.name for s in all_steps(TINY) if s.group in GROUPS]
    assert [e["step"] for e in events if e["event"] == "begin"] == wanted
    assert [(e["step"], e["error"]) for e in events if e["event"] == "end"] == [(n, None) for n in wanted]
    result = result_of(events, TINY)
    found = {(r["op"], r["pass"]) for r in result["rows"]}
    assert {
        ("copy", "forward"),
        ("matmul", "forward"),
        ("select_blocks", "forward"),
        ("sparse_attention", "forward"),
        ("select_blocks", "chunk"),
        ("sparse_attention", "chunk"),
        ("sparse_attention", "backward"),
        ("lightning_attention", "forward"),
        ("lightning_attention", "decode"),
        ("lightning_attention", "backward"),
        ("sparse step", "decode"),
        ("scaled_dot_product_attention", "forward"),
        ("norm_rope", "forward"),
        ("norm_gate", "forward"),
        ("first token", "forward"),
        ("decode step", "decode"),
    } <= found
    assert {r["dtype"] for r in result["rows"] if r["op"] == "lightning_attention"} == {"bfloat16", "float32"}
    shapes = {r["shape"] for r in result["rows"] if r["op"] == "first token"}
    assert shapes == {f"T={n}" for n in (*TINY.prompts, TINY.long_prompt)}
    names = {t["name"].split(",")[0] for t in result["targets"]}
    assert {
        "lightning over its bandwidth floor",
        "select_blocks over its floor",
        "selection + sparse attention over dense attention",
        "first token over its floor",
        "decoding step over reading the weights once",
    } <= names
    with (tmp_path / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(result["rows"])
    page = path.with_suffix(".md").read_text()
    assert "## Targets" in page and "## Failed" not in page and "skipped" in page
    assert any("decoding steps are captured (1 graphs)" in note for note in result["notes"])
    assert path.with_suffix(".ledger.md").read_text() == PAGE.read_text()  # a rehearsal measures nothing
    assert path.with_suffix(".profile.txt").read_text().count("launches") == 2


def context(tmp_path, until=float("inf")):
    device = Rehearsal()
    report = Live(device, tmp_path / "run.jsonl", tmp_path / "rows.csv")
    return Context(device, report, TINY, tmp_path, "run", until)


def row(context, name):
    context.report.add(name, "triton", Timing(1, 2, 3, 4), shape="T=1")


def test_a_step_that_fails_keeps_its_rows_and_the_next_goes_on(tmp_path):
    def fails(context):
        row(context, "before")
        assert "before" in (tmp_path / "rows.csv").read_text()  # on disk at once
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nmore lines")

    here = context(tmp_path)
    steps = [
        Step("a", "kernels", 1, fails),
        Step("b", "kernels", 1, lambda c: row(c, "after")),
        Step("c", "model", 1, lambda c: pytest.fail("there is no time left for it")),
    ]
    assert run_steps(steps, here, {"kernels": float("inf"), "model": time.time() + 0.5})
    result = result_of(read_events(here.report.events), TINY)
    assert [r["op"] for r in result["rows"]] == ["before", "after"]
    assert result["failed"] == [("a", "OutOfMemoryError: CUDA out of memory. Tried to allocate 80 GiB")]
    assert [name for name, _ in result["skipped"]] == ["c"]
    log = (tmp_path / "run.log").read_text()
    assert "Traceback" in log and "more lines" in log


def test_a_sick_device_hands_over_to_a_process_that_goes_on_behind(tmp_path, monkeypatch):
    def fails(context):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    steps = [Step("a", "kernels", 0, fails), Step("b", "kernels", 0, lambda c: row(c, "b"))]
    here, ends = context(tmp_path), {"kernels": float("inf")}
    monkeypatch.setattr(here.device, "is_well", lambda: False, raising=False)
    assert not run_steps(steps, here, ends)
    assert [e["event"] for e in read_events(here.report.events)] == ["begin", "end"]
    assert run_steps(steps, context(tmp_path), ends)
    assert [e["step"] for e in read_events(here.report.events) if e["event"] == "begin"] == ["a", "b"]


def test_a_step_that_hangs_is_ended_from_outside_and_the_run_goes_on(tmp_path, monkeypatch):
    script, events = gpu_script(), tmp_path / "run.jsonl"
    monkeypatch.setattr(script, "GRACE", 0.5)
    program = tmp_path / "process.py"
    program.write_text(
        "import json, sys, time\n"
        f"path = {str(events)!r}\n"
        "old = open(path).read() if __import__('os').path.exists(path) else ''\n"
        "name, limit = ('b', 1e12) if old else ('a', 0)\n"
        "def say(e): print(json.dumps(e), file=open(path, 'a'), flush=True)\n"
        "say({'event': 'begin', 'step': name, 'limit': limit})\n"
        "if not old: time.sleep(600)\n"
        "say({'event': 'end', 'step': name, 'error': None})\n"
    )
    script.run_processes([sys.executable, str(program)], events, time.time() + 60, {})
    result = result_of(read_events(events), TINY)
    assert result["failed"] == [("a", "the process ended in it")]
    assert [e["step"] for e in read_events(events) if e["event"] == "end"] == ["b"]


def test_each_group_has_its_share_of_the_time():
    ends = group_ends(list(GROUPS), 100.0, 1000.0)
    assert list(ends) == list(GROUPS) and ends["million"] == 1100.0
    assert ends["ceilings"] == 1100 and 100 < ends["tests"] < ends["kernels"] < ends["model"] < 1100
    assert group_ends(["model"], 0.0, 60.0) == {"model": 60.0}
    assert groups_of(" million, ceilings") == ["ceilings", "million"] and groups_of("") == list(GROUPS)
    with pytest.raises(ValueError, match="--only takes ceilings, .*, got 'kernel'"):
        groups_of("kernel")


def test_every_step_has_a_name_of_its_own_and_a_known_group():
    steps = all_steps(Sizes())
    assert len({s.name for s in steps}) == len(steps)
    assert {s.group for s in steps} <= {*GROUPS, *OPTIONAL}


def test_the_files_for_gpus_are_found_and_stopped_in_time(tmp_path, monkeypatch):
    names = [path.name for path in gpu_tests.files()]
    assert {"test_lightning_gpu.py", "test_sparse_gpu.py"} <= set(names) and "test_fake_gpu.py" not in names
    path = tmp_path / "test_slow_gpu.py"
    path.write_text("import time\ndef test_fast(): pass\ndef test_slow(): time.sleep(600)\n")
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    here = context(tmp_path, time.time() + 20)
    with pytest.raises(
        RuntimeError, match="stopped after .* s: 1 passed, 0 failed, the last line was test_slow"
    ):
        gpu_tests.run_file(here, path, "not large_memory", 0.25)
    assert "test_fast PASSED" in (tmp_path / "run.tests.log").read_text()
    path.write_text("def test_wrong(): assert False\n")
    with pytest.raises(RuntimeError, match="1 failed in .*; test_wrong"):
        gpu_tests.run_file(here, path, "not large_memory")


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps({"event": "note", "text": "x"}) + '\n{"event": "ro')
    assert read_events(path) == [{"event": "note", "text": "x"}]


def test_the_released_model_has_9_48_billion_parameters():
    with torch.device("meta"):
        model = MiniCPMSALAForCausalLM._from_config(Sizes().config(), dtype=torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    assert released_config().lightning_nkv == 32
    assert round(count / 1e9, 2) == 9.48, count


def test_the_dense_model_in_pieces_is_the_model(tmp_path):
    here = context(tmp_path)
    model = dense.model_of(here)
    ids = torch.randint(3, model.config.vocab_size, (1, 50))
    with torch.inference_mode():
        wanted = model(ids).logits[:, -1]
    assert torch.allclose(dense.prefill_in_pieces(model, ids, piece=16), wanted, atol=1e-5)
    assert run_steps(dense.steps((40,)), here, {"dense": float("inf")})
    result = result_of(read_events(here.report.events), TINY)
    assert [r["backend"] for r in result["rows"]] == ["Qwen3 8B shape"] and not result["failed"]


SPEC = BlockSpec(kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=4)


def lists(tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, tokens, heads, 16, generator=generator) for heads in (4, 2))
    return q, k, select_blocks(q, k, SPEC, backend="torch")


def test_scores_of_blocks_are_those_of_the_reference_implementation():
    q, k, _ = lists()
    wide = k[0].double()
    k1, k2 = (naive_compress_keys(wide, size, stride) for size, stride in ((8, 4), (32, 16)))
    for position in (0, 6, 7, 30, 31, 100, 199):
        query = q[0, position].double()
        wanted = naive_block_scores(query, k1, k2, SPEC, position, 0.25, "coarse")
        got = verify.block_scores(query, k1.transpose(0, 1), k2.transpose(0, 1), SPEC, position)
        assert torch.allclose(got, wanted, rtol=1e-9), position


def test_lists_are_right_up_to_ties():
    q, k, blocks = lists()
    every = range(blocks.shape[1])
    assert verify.check_lists(q, k, blocks, SPEC, every) < 1e-3
    k[:, 20:] = k[:, 20:21]  # all later keys alike: blocks 2 to 9 tie
    blocks = select_blocks(q, k, SPEC, backend="torch")
    row = blocks[0, 199, 0].tolist()
    free = next(b for b in range(2, 10) if b not in row)
    taken = next(b for b in row if 2 <= b < 10)
    blocks[0, 199, 0] = torch.tensor(sorted({*row, free} - {taken}))
    assert verify.check_lists(q, k, blocks, SPEC, every) < 1e-3


@pytest.mark.parametrize("wrong", ["another block", "unsorted", "short", "future", "no window"])
def test_wrong_lists_are_refused(wrong):
    q, k, blocks = lists()
    row = blocks[0, 199, 0]
    left_out = [b for b in range(13) if b not in row.tolist()]
    if wrong == "another block":
        free = row.tolist()[1]
        row.copy_(torch.tensor(sorted({*row.tolist(), left_out[0]} - {free})))
    elif wrong == "unsorted":
        row.copy_(row.flip(0))
    elif wrong == "short":
        row[-1] = -1
    elif wrong == "future":
        row[-1] = 13
    else:
        row.copy_(torch.tensor(sorted({*row.tolist(), left_out[0]} - {11})))
    with pytest.raises(ValueError, match="select_blocks is not timed: the list of token 199 is wrong"):
        verify.check_lists(q, k, blocks, SPEC, [199])


def test_correlated_queries_share_more_blocks_than_random_ones():
    shape = kernels.Shape(1024, 4, 2, 16, torch.float32, SPEC)
    torch.manual_seed(0)
    shared = {}
    for queries in ("correlated", "random"):
        q, k, _ = kernels.draw(shape, torch.device("cpu"), queries)
        assert 0.9 < q.std() < 1.1
        shared[queries] = kernels.sharing(select_blocks(q, k, SPEC, backend="torch"))
    assert shared["correlated"] < 0.8 * shared["random"]


def test_targets_are_made_of_the_rows_there_are():
    rows = [
        {"op": "copy", "pass": "forward", "backend": "torch", "dtype": "float32", "shape": "", "gbs": 3000.0},
        {"op": "matmul", "pass": "forward", "backend": "torch", "dtype": "bfloat16", "gflops": 7e5},
        {
            "op": "lightning_attention",
            "pass": "forward",
            "backend": "triton",
            "dtype": "bfloat16",
            "shape": "T=65536 H=32 D=128",
            "p50_ms": 1.4316,
        },
    ]
    assert targets(rows[:1], Sizes()) == []
    (target,) = targets(rows, Sizes())
    assert target.name == "lightning over its bandwidth floor, 65,536 tokens, bfloat16"
    assert 1.99 < target.value < 2 and target.ok
