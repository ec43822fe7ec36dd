# Each command does its own set-up in .venv and repeats it only when its inputs change.
# Needed on the machine: Python 3.10 or later, make, a C++ compiler.

VENV := .venv
BIN := $(VENV)/bin

# The first of these that is recent enough; `make PYTHON=/path/to/python3 demo` takes another.
RECENT := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(firstword $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	if $$p -c '$(RECENT)' 2>/dev/null; then echo $$p; break; fi; done) python3)

PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# An installation is stale when the metadata, the pins or the set of import packages changed.
INPUTS := setup.py constraints.txt dit_engine/_version.py \
	$(wildcard kernels/dit_kernels/__init__.py export/dit_export/__init__.py \
	benchmarks/dit_bench/__init__.py)

DEMO_LABELS := clay critters cutouts landscape marbles moods open-peeps pixel-art \
	planets shadows slice sprouts stack thumbs voxel-bot waves

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint format train clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.base ## generate a labelled sheet with the built-in model (installs on first use)
	@mkdir -p demo
	$(BIN)/dit-generate --model builtin --labels $(DEMO_LABELS) --steps 25 --sampler dpm++ \
		--guidance-scale 2.5 --guidance-channels all --seed 100 -o demo/sheet.png

test: $(VENV)/.test ## run the whole test suite; a part of it: make test ARGS="-k guidance"
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.lint ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(VENV)/.lint ## format the code and apply safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

train: $(VENV)/.train ## train a small model on the avatar set: two hours on 2 cores, resumable
	$(BIN)/dit-train -o runs/own $(ARGS)

clean: ## remove .venv, caches, build results and the demo's pictures
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c '$(RECENT)' || { \
		echo 'error: $(PYTHON) is not Python 3.10 or later; name one: make PYTHON=/path/to/python3' >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.base: $(INPUTS) | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.test: $(INPUTS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[test]'
	@touch $(VENV)/.base $@

$(VENV)/.train: $(INPUTS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[train]'
	@touch $(VENV)/.base $@

# The type checker reads the optional packages too, so lint stands on the test installation.
$(VENV)/.lint: $(INPUTS) $(VENV)/.test | $(BIN)/python
	$(PIP_INSTALL) -e '.[test,lint]'
	@touch $@
