# make demo, make test: from a bare checkout to done. make check: style, types, direction of imports.
# make test-oldest, make test-newest: what a dependency can break, with the oldest and newest versions that pyproject.toml allows.
# make test-page: the server's page in Chromium (which has to be installed, with Node and npm); part of make test once it was made.
# make lock: renews the lock files, from which all of these install.
# make gpu: tests, times and report of the GPU kernels, with the Python that has torch and Triton; OUT is where they go,
# GPU holds options of scripts/gpu.py (GPU='--seconds 270').
# make reproduce: the SmolLM2 hybrid from the original's weights to its tables, in RUN; make smoke: the same steps at tiny sizes.
# make figures: every figure of speed in README and docs measured again, in runs/figures (RUN=), one process after the
# other for some hours; FIGURES holds options of scripts/reproduce_speed.py (FIGURES='--only ops,engine', FIGURES=--list).
PYTHON ?= python3
BIN := .venv/bin
OUT ?= benchmarks
RUN ?= runs/reproduce
TORCH := torch==2.13.0
# A process for each core (four at most, each takes 1 to 2 GB), with one thread: tests of threads ask for theirs.
PYTEST := -m pytest -n logical --maxprocesses 4 --dist worksteal
COMPATIBILITY := -m 'not triton' tests/model tests/engine tests/test_docs.py tests/test_cli.py tests/test_fuzz_options.py \
	tests/cli/test_entry.py::test_stderr_holds_what_we_print_and_nothing_else

.PHONY: demo test test-oldest test-newest test-page check lock gpu reproduce smoke figures clean

# An environment is made anew when its inputs change, so that nothing of an older one stays in it.
define make-venv
$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
$(PYTHON) -m venv --clear $(@D)
endef
PIP-INSTALL = $(@D)/bin/python -m pip install --quiet --disable-pip-version-check

# torch alone, after the lock, which has everything both of its builds need: pip then takes the build for the CPU
# wherever one is offered, and adds nothing to it; the build for CUDA brings its own libraries.
define install-lock
$(make-venv)
$(PIP-INSTALL) --no-deps --require-hashes -r requirements-build.lock
$(PIP-INSTALL) --no-deps --require-hashes --no-build-isolation --use-pep517 -r $(LOCK)
$(PIP-INSTALL) $(TORCH)
$(PIP-INSTALL) --no-deps --no-build-isolation -e .
$(@D)/bin/python -m pip check
touch $@
endef

.venv/ready: LOCK := requirements.lock
.venv/ready: requirements.lock requirements-build.lock pyproject.toml
	$(install-lock)

.venv-oldest/ready: LOCK := requirements-oldest.lock
.venv-oldest/ready: requirements-oldest.lock requirements-build.lock pyproject.toml
	$(install-lock)

.venv-newest/ready: pyproject.toml
	$(make-venv)
	$(PIP-INSTALL) $(TORCH)
	$(PIP-INSTALL) $(TORCH) -e '.[test]'
	$(@D)/bin/python -m pip check
	touch $@

demo: .venv/ready
	$(BIN)/opensala demo --pull

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-oldest test-newest: test-%: .venv-%/ready
	OMP_NUM_THREADS=1 .venv-$*/bin/python $(PYTEST) $(COMPATIBILITY)

test-page: .venv/ready
	npm ci --prefix tests/page/browser --ignore-scripts --no-audit --no-fund
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/page

check: .venv/ready
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_structure.py

# The oldest lock says datasets<5 because datasets caps fsspec: without it the resolver raises datasets, not lowers fsspec.
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --upgrade \
	--no-emit-package torch
lock: .venv/ready
	$(COMPILE) --group build -o requirements-build.lock
	echo '$(TORCH)' | $(COMPILE) pyproject.toml --extra dev -c - -o requirements.lock
	printf '$(TORCH)\ndatasets<5\n' | $(COMPILE) pyproject.toml --extra test -c - --resolution lowest-direct \
		--no-emit-package triton -o requirements-oldest.lock

gpu:
	$(PYTHON) scripts/gpu.py --output $(OUT) $(GPU)

# The GGUF reader of the pull and all of this package's own come with the lock.
reproduce: .venv/ready
	$(BIN)/python scripts/reproduce.py $(RUN) $(REPRODUCE)

smoke: .venv/ready
	$(BIN)/python scripts/reproduce.py $(RUN)-smoke --smoke

figures: RUN := runs/figures
figures: .venv/ready
	$(BIN)/python scripts/reproduce_speed.py $(RUN) $(FIGURES)

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist
