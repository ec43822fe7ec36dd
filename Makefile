# Each command does its own set-up in .venv and repeats it only when its inputs change.
# Needed on the machine: Python 3.10 or later, make, a C++ compiler.

VENV := .venv
BIN := $(VENV)/bin

# The first of these that is recent enough; `make PYTHON=/path/to/python3 demo` takes another.
RECENT := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(firstword $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	if $$p -c '$(RECENT)' 2>/dev/null; then echo $$p; break; fi; done) python3)

PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# An installation is stale when the metadata, the pins or the native kernels' sources changed.
INPUTS := setup.py constraints.txt dit_engine/_version.py CMakeLists.txt \
	$(wildcard kernels/csrc/cpu/*.h kernels/csrc/cpu/*/*.cpp kernels/csrc/cpu/*/*.h) \
	$(wildcard kernels/dit_kernels/cpu/*.h)

# The server that the tests run, in an environment of its own: it needs numpy below 2. Its wheel is
# for Linux on x86-64 with glibc 2.35 or later; elsewhere its tests are skipped. It holds Triton 2.51,
# the newest version published as a wheel. It has published vulnerabilities: use it only on this
# machine.
SERVES := import platform, sys; libc = platform.libc_ver(); sys.exit(not (platform.machine() \
	== "x86_64" and libc[0] == "glibc" and tuple(map(int, libc[1].split("."))) >= (2, 35) \
	and (3, 10) <= sys.version_info[:2] <= (3, 12)))
SERVER := $(shell $(PYTHON) -c '$(SERVES)' 2>/dev/null && echo .venv-server/.done)

DEMO_LABELS := clay critters cutouts landscape marbles moods open-peeps pixel-art \
	planets shadows slice sprouts stack thumbs voxel-bot waves

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-quick faults server asan bench-cpu lint format train clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.base ## generate a labelled sheet with the built-in model (installs on first use)
	@mkdir -p demo
	$(BIN)/dit-generate --model builtin --labels $(DEMO_LABELS) --steps 25 --sampler dpm++ \
		--guidance-scale 2.5 --guidance-channels all --seed 100 -o demo/sheet.png

# Each worker computes with one thread and takes whole files (tests/conftest.py), in the order of
# their names, which begins with the slow ones. The later of two -n counts: ARGS="-n 0" is one process.
PYTEST := $(BIN)/python -m pytest -n auto --no-loadscope-reorder

test: $(VENV)/.test $(SERVER) ## run all tests, one worker per core; some: make test ARGS="-k guidance"
	$(PYTEST) $(ARGS)

test-quick: $(VENV)/.test ## run the tests that need no server, no GPU and at most about two seconds each
	$(PYTEST) -m "not slow and not server and not gpu" $(ARGS)

faults: $(VENV)/.test ## plant small faults, one at a time, and see that the tests find each; an hour
	$(BIN)/python tests/faults.py $(ARGS)

server: $(SERVER) ## install a Triton Inference Server in .venv-server, for the tests and for trying
	@test -n "$(SERVER)" || { echo "error: its wheel is for Linux on x86-64 with glibc 2.35 or later" \
		"and Python 3.10 to 3.12" >&2; exit 1; }

asan: $(VENV)/.test ## run the native kernels' tests under AddressSanitizer and UBSan
	$(BIN)/cmake -S . -B build/asan -DDIT_SANITIZE=ON -DCMAKE_CXX_COMPILER=$(CXX)
	$(BIN)/cmake --build build/asan --parallel
	LD_PRELOAD="$(foreach l,libasan.so libstdc++.so.6,$(shell $(CXX) -print-file-name=$l))" \
		ASAN_OPTIONS=detect_leaks=0 DIT_KERNELS_LIBRARY=$(CURDIR)/build/asan/libdit_kernels_cpu.so \
		CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g" \
		$(BIN)/python -m pytest -q $(ARGS) tests/kernels/test_amx_emulation.py \
		$(filter-out %_library.py,$(wildcard tests/kernels/test_native_*.py))

bench-cpu: $(VENV)/.bench ## measure the lean forward beside its peers, on an idle machine; write JSON
	$(BIN)/python -m dit_bench cpu $(ARGS)

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
	rm -rf $(VENV) .venv-server build dist demo *.egg-info .pytest_cache .ruff_cache
	rm -f kernels/dit_kernels/cpu/*.so kernels/dit_kernels/cpu/libdit_kernels_cpu.txt
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

.venv-server/.done: constraints-server.txt
	$(PYTHON) -m venv --clear .venv-server
	.venv-server/bin/python -m pip install --disable-pip-version-check --no-deps -r $<
	@touch $@

$(VENV)/.train: $(INPUTS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[train]'
	@touch $(VENV)/.base $@

$(VENV)/.bench: $(INPUTS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[bench,peers]'
	@touch $(VENV)/.base $@

# The type checker reads the optional packages too, so lint stands on the test installation.
$(VENV)/.lint: $(INPUTS) $(VENV)/.test | $(BIN)/python
	$(PIP_INSTALL) -e '.[test,lint]'
	@touch $@
