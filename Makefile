# make demo, make test: from a bare checkout to done. make check: style, types, direction of imports.
# make gpu: tests, times and report of the GPU kernels, with the Python that has torch and Triton; OUT is where they go.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= benchmarks

.PHONY: demo test check gpu clean

# torch first, alone and pinned: a CPU build is found that way on a CPU-only machine.
.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/opensala demo

test: .venv/ready
	$(BIN)/python -m pytest

check: .venv/ready
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_structure.py

gpu:
	$(PYTHON) scripts/gpu.py --output $(OUT)

clean:
	rm -rf .venv build dist
