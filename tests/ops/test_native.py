"""The compiled kernels: built once, cached, and replaced by PyTorch, with a reason, where they cannot be
built."""

import ctypes
import logging
from pathlib import Path

import pytest
import torch

from opensala.ops import (
    backends,
    lightning_attention,
    native,
    norm_gate,
    norm_rope,
    select_blocks,
    use_backend,
)
from opensala.ops.native import signatures


@pytest.fixture
def fresh(monkeypatch):
    """As in a new process: nothing loaded, nothing said."""
    native.library.cache_clear()
    monkeypatch.setattr(backends, "_said", set())
    yield monkeypatch
    native.library.cache_clear()


def run():
    x = torch.randn(1, 5, 2, 4)
    return lightning_attention(x, x, x, torch.tensor([0.1, 0.2]))[0]


def test_kernels_are_compiled_once_and_kept(fresh, tmp_path, caplog):
    fresh.setenv("OPENSALA_CACHE", str(tmp_path))
    with caplog.at_level(logging.INFO, "opensala"):
        run()
        made = sorted(tmp_path.iterdir())
        assert [p.suffix for p in made] == [".so"] and native.library().reason is None
        times = [p.stat().st_mtime_ns for p in made]
        native.library.cache_clear()
        run()
    assert [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())] == times
    assert sum("compiling" in r.getMessage() for r in caplog.records) == 1


def test_without_a_compiler_torch_runs_and_says_so(fresh, tmp_path, caplog):
    fresh.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.INFO, "opensala"):
        run(), run()
        norm_gate(torch.ones(1, 4), torch.ones(4), None, 1e-6)
    reason = "cpp cannot run it: no C++ compiler was found (g++ or clang++; the variable CXX names another)"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", f"attention runs on the slower torch backend on cpu: {reason}"),
        ("INFO", f"lightning_attention: torch backend on cpu ({reason})"),
        ("INFO", f"norm_gate: torch backend on cpu ({reason})"),
    ]
    with (
        pytest.raises(ValueError, match="backend 'cpp' cannot run lightning_attention here: no C.. compiler"),
        use_backend("cpp"),
    ):
        run()


def test_a_compiler_that_fails_is_reported(fresh, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho "vec.h: no such instruction" >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    fresh.setenv("CXX", str(broken))
    fresh.setenv("OPENSALA_CACHE", str(tmp_path / "cache"))
    assert "could not compile the kernels: vec.h: no such instruction" in native.library().reason
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_reported(fresh, tmp_path):
    (tmp_path / "file").write_text("")
    fresh.setenv("OPENSALA_CACHE", str(tmp_path / "file"))
    assert "could not be stored or loaded" in native.library().reason


def test_the_choice_of_backend(monkeypatch):
    x = torch.zeros(1)
    both = {"cpp": None, "triton": None}
    assert backends.choose_backend("op", x, None, both) == "cpp"
    assert backends.choose_backend("op", x.double(), None, both) == "torch"
    assert backends.choose_backend("op", x, None, {}) == "torch"
    assert backends.choose_backend("op", x, None, {"cpp": "too odd"}) == "torch"
    with use_backend("torch"):
        assert backends.choose_backend("op", x, None, both) == "torch"
        assert backends.choose_backend("op", x, "cpp", both) == "cpp"
    with use_backend("cpp"):
        assert backends.choose_backend("op without it", x, None, {}) == "torch"
    monkeypatch.setenv("OPENSALA_BACKEND", "naive")
    assert backends.choose_backend("op", x, None, both) == "naive"
    monkeypatch.setenv("OPENSALA_BACKEND", "fast")
    with pytest.raises(ValueError, match="'fast' is not one of naive, torch, cpp, triton"):
        backends.choose_backend("op", x, None, both)
    with pytest.raises(ValueError, match="backend 'cpp' cannot run op here: too odd"):
        backends.choose_backend("op", x, "cpp", {"cpp": "too odd"})
    with pytest.raises(ValueError, match="it computes in float32, and the tensors are float64"):
        select_blocks(
            torch.zeros(1, 1, 1, 4).double(), torch.zeros(1, 1, 1, 4).double(), native_spec(), backend="cpp"
        )


def native_spec():
    from opensala.ops import BlockSpec

    return BlockSpec()


def test_as_many_threads_as_torch_uses_give_the_same_answer():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 3000, 1, 16, generator=generator) for _ in range(3))
    decay, before = torch.tensor([0.01]), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = lightning_attention(q, k, v, decay, backend="cpp")
        torch.set_num_threads(4)  # more threads than heads: the sequence is cut into segments
        four = lightning_attention(q, k, v, decay, backend="cpp")
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, four, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_whole_number_is_as_good_as_a_float():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 8, generator=generator) for _ in range(3))
    decay, weight = torch.tensor([0.1, 0.2]), torch.ones(8)
    for op in (
        lambda number: lightning_attention(q, k, v, decay, scale=number(1), backend="cpp")[0],
        lambda number: norm_rope(q, weight, None, None, eps=number(1), backend="cpp"),
        lambda number: norm_gate(q, weight, None, eps=number(1), backend="cpp"),
    ):
        assert torch.equal(op(int), op(float))


def test_calls_that_do_not_fit_the_declaration_are_refused():
    name = "opensala_norm_gate"
    x = torch.ones(4)
    address = ctypes.c_void_p(x.data_ptr())
    right = (address, 0, None, None, 0, address, 0, 1, 4, 1e-6, 1)
    native.library().call(name, *right)
    with pytest.raises(TypeError, match="opensala_norm_gate takes 11 arguments, got 10"):
        native.library().call(name, *right[:-1])
    with pytest.raises(TypeError, match="opensala_norm_gate takes 11 arguments, got 12"):
        native.library().call(name, *right, 1)
    with pytest.raises(ctypes.ArgumentError, match="argument 8"):
        native.library().call(name, *right[:7], 1.0, *right[8:])


def test_signatures_are_those_of_the_sources():
    found = signatures.declared(
        """extern "C" void f(
            const float* q, const void *k, int64_t n,  // tokens
            float scale, int64_t threads) {"""
    )
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    assert found == {"f": (pointer, pointer, number, ctypes.c_float, number)}
    with pytest.raises(AssertionError, match="double eps"):
        signatures.declared('extern "C" void f(double eps) {')
    sources = sorted(Path(native.__file__).parent.glob("*.cpp"))
    exported = sum(source.read_text().count('extern "C"') for source in sources)
    assert len(signatures.declared("".join(s.read_text() for s in sources))) == exported >= 7


@pytest.fixture
def quick_compiler(tmp_path):
    """Writes what it is asked for at once, and its arguments into a log."""
    script = tmp_path / "c++"
    script.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && echo 1 && exit
echo "$@" >> {tmp_path}/log
for last; do :; done
seq 2000 > "$last"
"""
    )
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("damage", [lambda b: b[:999], lambda b: b[:99] + b"?" + b[100:], lambda b: b""])
def test_a_damaged_file_in_the_cache_is_compiled_anew_and_said(
    fresh, tmp_path, caplog, quick_compiler, damage
):
    """Such a file loads, and ends the process with a bus error at the first touch of what is missing."""
    fresh.setenv("OPENSALA_CACHE", str(tmp_path / "cache"))
    made = native.build(quick_compiler)
    whole = made.read_bytes()
    linked = (tmp_path / "log").read_text().count("-shared")
    assert native.build(quick_compiler) == made and (tmp_path / "log").read_text().count("-shared") == linked
    made.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING, "opensala"):
        assert native.build(quick_compiler).read_bytes() == whole
        assert native.build(quick_compiler) == made
    assert [r.getMessage() for r in caplog.records] == [f"{made} is damaged: compiling it again"]
    assert list((tmp_path / "cache").iterdir()) == [made]
