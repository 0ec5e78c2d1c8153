# `make help` lists the targets. Two environments, both made on first use by scripts/environment.py and kept:
#   .venv-race  piste[race]; builds on the torch of the calling python3 where there is one
#   .venv       piste[dev] with every version pinned, for everything else

PYTHON ?= python3
VENV_RACE ?= .venv-race
VENV ?= .venv
# Where pip looks for torch (and torch alone), for example an index of CPU builds. Empty: pip's own setting.
TORCH_INDEX_URL ?=
# Passed on to the command: make race ARGS="--steps 200", make test ARGS="-k lookahead".
ARGS ?=

environment = @$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
  echo "piste: Python 3.10 or newer is needed, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -n 1)"; \
  echo "piste: name another one, for example: make PYTHON=python3.12 $@"; exit 1; } >&2; \
  $(PYTHON) scripts/environment.py $(if $(TORCH_INDEX_URL),--torch-index-url '$(TORCH_INDEX_URL)') \
  $(if $(filter file,$(origin PYTHON)),,--exact-python)

# Tests run in two processes; each keeps to one thread. Each begins with half of the tests, in their order, so that what
# neighbours share is made once; whoever is ready first takes over some of what the other has left.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help race environment-race environment test test-all test-fast test-slow lint format docs bench bench-gpu test-gpu precision sharpness gallery clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

race: environment-race  ## install what is missing, race four optimizers on two real tasks, print verdict and report
	@$(VENV_RACE)/bin/piste race $(ARGS)

test: lint test-fast  ## install what is missing, then lint and every quick test
test-all: test test-slow  ## `make test`, then the slow tests (real frameworks, a browser, many runs)

environment-race:
	$(environment) --extra race --reuse-torch $(VENV_RACE)

environment:
	$(environment) --extra dev $(VENV)

test-fast: environment
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-slow: environment  ## the slow tests alone
	$(PYTEST) -m "slow and not gpu" $(ARGS)

lint: environment  ## ruff (rules and format) and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: environment  ## let ruff rewrite what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: environment  ## build the documentation site into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet $(ARGS)

test-gpu: environment  ## on a machine with a GPU: the matrix and what else needs one, then the memory checker if there is one
	TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m gpu $(ARGS)
	@if command -v compute-sanitizer >/dev/null; then \
	  TRITON_INTERPRET=0 compute-sanitizer --tool memcheck --error-exitcode 1 $(VENV)/bin/python -m pytest -m gpu -k checked; \
	else echo "piste: compute-sanitizer is not installed; memory was not checked" >&2; fi

bench-gpu: environment  ## on a machine with a GPU: write docs/benchmarks-gpu.md
	$(VENV)/bin/python -m benchmarks.gpu $(ARGS)

bench: environment  ## speed and memory against torch's optimizers and other libraries'
	$(VENV)/bin/python -m benchmarks $(ARGS)
	$(VENV)/bin/python -m benchmarks.race $(ARGS_RACE)
	$(VENV)/bin/python -m benchmarks.matrices $(ARGS_MATRICES)
	$(VENV)/bin/python -m benchmarks.overhead $(ARGS_OVERHEAD)
	$(VENV)/bin/python -m benchmarks.packing $(ARGS_PACKING)
	$(VENV)/bin/python -m benchmarks.records $(ARGS_RECORDS)

precision: environment  ## the measurements behind docs/precision.md (an hour)
	$(VENV)/bin/python -m scripts.precision maps
	$(VENV)/bin/python -m scripts.precision training

sharpness: environment  ## the measurement behind docs/sharpness.md (ten minutes)
	$(VENV)/bin/python -m scripts.sharpness

gallery: environment  ## draw the ways of all optimizers down three hills, into docs/gallery
	$(VENV)/bin/python -m scripts.gallery $(ARGS)

clean:  ## remove both environments and all caches; race results stay
	for made in $(VENV_RACE) $(VENV); do if [ -e $$made/made-by-piste ]; then rm -rf $$made $$made.lock; fi; done
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .piste-cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
