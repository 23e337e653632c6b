# Everything a developer runs. Each target works alone on a fresh clone: Debian, Python 3.11 or newer, gcc.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
CPP_SOURCES := $(wildcard $(addsuffix /*.[ch]*,kernels/cpu tests/kernels/cpp tools/bench/bare))
SOURCES := $(wildcard kernels/cpu/*) setup.py setup.cfg pyproject.toml requirements.txt

# Tests in two processes a core, since many wait; a file's tests share one, for what its fixtures make.
# `make check WORKERS=0`: in this process. Byte code is kept, whatever the environment says: many processes start. torch
# takes one thread in each: more would wait for each other in busy loops, at four times the processor time.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS ?= $(shell echo $$((2 * $$(nproc))))
PARALLEL := -n $(WORKERS) --maxprocesses 8 --dist loadfile

DOCS := build/docs
DOCS_BIN := $(DOCS)/environment/bin

.PHONY: install check test test-all lint types fast suite programs cases sanitize soak engines demo demo-train \
	bench docs wheel clean

install: $(STAMP)

# torch first and by itself: the pinned release, so that no other package asks for another build of it.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $(STAMP)

# While you work: lint, types and the fast tests (what the marks mean: tests/support/marks.py).
check: lint types fast

# Before a push, and what CI runs: all but sweeps and soaks.
test: lint types suite

# Before a release: everything, sweeps too.
test-all: lint types programs
	$(PYTEST) $(PARALLEL)

# The hooks of .pre-commit-config.yaml run the same commands.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)
	$(BIN)/codespell
	$(BIN)/python tests/support/tidy.py

types: install
	$(BIN)/mypy

fast: install
	$(PYTEST) $(PARALLEL) -m "not gpu and not daemon and not process and not long and not slow"

suite: install programs
	$(PYTEST) $(PARALLEL) -m "not slow"

# The C++ test programs, below build/; what has not changed is not compiled again.
programs: install
	$(BIN)/python tests/support/cpp_programs.py

# Small scripts that each state a right behaviour, from a folder beside the repository; without it, the suite.
cases: install
	$(BIN)/python tests/cases.py

# The C++ tests under the sanitizers. The writer that is killed step by step stays out: its children never end by
# themselves.
sanitize: install
	TIERSTORE_TEST_CXXFLAGS="-O1 -fsanitize=thread -Wno-tsan" $(PYTEST) tests/kernels/test_cpp.py -k "not kill"
	TIERSTORE_SOAK=1 TIERSTORE_TEST_CXXFLAGS="-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
		$(PYTEST) tests/kernels/test_cpp.py -k "not kill"

# What make test does for seconds, for an hour or more: daemons and clients killed, moved, lied to and loaded; commands
# and lookups interrupted and without memory. Prints its figures.
soak: install
	TIERSTORE_SOAK=1 $(PYTEST) -rP tests/faults/test_daemon_soak.py tests/faults/test_socket_hostile.py \
		tests/remote/test_hostile.py tests/faults/test_interrupts.py tests/faults/test_lookup_interrupts.py \
		tests/faults/test_memory_errors.py tests/faults/test_checkpoint_folders.py

# The plug-ins inside the real engines, on a CPU, against the engines' own tables. Its environments take 7 GB below
# build/engines; the first run takes most of an hour. `make engines ONLY=daemon`: cases with that in their name.
ONLY ?=
engines: install
	$(BIN)/python tests/engines/lab/run.py --only "$(ONLY)"

demo: install
	$(BIN)/python -m tierstore.tools.demo

# Fine-tunes tables on real text, is killed in the middle, and resumes to the same bits.
demo-train: install
	$(BIN)/python -m tierstore.tools.demo.train

# make bench BENCH="warm cold"; `tierstore bench --help` lists them.
BENCH ?= build
bench: install
	$(BIN)/tierstore bench $(BENCH)

# The documentation as a site that works without a network: build/docs/html/index.html. Sphinx has an environment of its
# own, with the extra `docs`, so that it changes nothing of what tests run with.
docs: install $(DOCS)/installed
	$(BIN)/python docs/builder/build.py $(DOCS) $(DOCS_BIN)/sphinx-build

$(DOCS)/installed: docs/builder/packages.py setup.cfg
	mkdir -p $(DOCS)
	test -x $(DOCS_BIN)/python || $(PYTHON) -m venv $(DOCS)/environment
	$(PYTHON) docs/builder/packages.py > $(DOCS)/packages.txt
	$(DOCS_BIN)/python -m pip install --quiet --disable-pip-version-check -r $(DOCS)/packages.txt
	touch $@

# For machines without a compiler: there, pip install dist/*.whl. It fits the same Python version and processor.
wheel: install
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .demo
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f kernels/_cpu*.so
