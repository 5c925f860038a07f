# `make demo` and `make test` do all their own set-up and work on a fresh clone: no GPU, no hub, no account.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# One thread per process: on a small machine the ranks and actors are the parallelism.
export OMP_NUM_THREADS ?= 1
export DS_ACCELERATOR ?= cpu
export TOKENIZERS_PARALLELISM ?= false
export RAY_USAGE_STATS_ENABLED ?= 0
export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= offline

.PHONY: demo demo-post test pytest test-all lint format bench install clean

install: $(STAMP)

# pip, not another installer: it takes a CPU build of torch where one is at hand. Torch first and alone, so that
# nothing else decides its build.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "torch>=2.10,<2.14"
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $(STAMP)

demo: install
	$(BIN)/qwenimg-dist demo

# Goes on from the demo's early checkpoint, which it makes where there is none.
demo-post: install
	$(BIN)/qwenimg-dist demo-post

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Lint beside the first tests, which wait now and then; two workers, file by file (tests/conftest.py).
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15

test: install
	$(MAKE) -j 2 lint pytest

pytest: install
	$(PYTEST)

test-all: lint
	$(PYTEST) -m "not gpu and not bench"

bench: install
	$(BIN)/python tests/bench/all.py --quick

clean:
	rm -rf .venv demo runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
