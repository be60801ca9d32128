# Everything runs from .venv, which every target builds when it is missing or out of date.
# ARGS reaches the program: make serve ARGS="--mesh 8", make test ARGS=tests/scheduler

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
PYTEST := $(BIN)/python -m pytest
# For programs that compile for GPUs which are not there; XLA complains of that at every start.
DESCRIBED := JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3

.DEFAULT_GOAL := help
.PHONY: help setup serve plan test parity aot slow bench lint

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

setup: .venv/.installed  ## build .venv (about a minute, once)

serve: .venv/.installed  ## serve: HTTP on 127.0.0.1:30000, gRPC on 30001
	@$(BIN)/python serve.py $(ARGS)

plan: .venv-aot/.installed  ## what a model takes of which GPUs, with none there: ARGS="--model GLM-4.5-FP8 --mesh 8"
	@$(DESCRIBED) .venv-aot/bin/python serve.py --plan $(ARGS)

test: .venv/.installed  ## the default test suite; needs no torch and no GPU
	@$(PYTEST) -n 2 $(ARGS)

parity: .venv/.parity  ## compare with transformers live; installs torch
	@$(PYTEST) -m parity $(ARGS)

aot: .venv-aot/.installed  ## compile for GPUs that need not be there, and check what came out (minutes)
	@$(DESCRIBED) .venv-aot/bin/python -m pytest -m aot -n 2 $(ARGS)

slow: .venv/.evaluate  ## the tests that take minutes; installs an evaluation harness
	@$(PYTEST) -m slow -n 2 --timeout 1200 $(ARGS)

bench: .venv/.installed  ## measure an engine on this machine (five minutes)
	@$(BIN)/python -m glmjax.bench $(ARGS)

lint: .venv/.installed  ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>&1) || found="not there"; \
	  echo "glmjax needs Python 3.11 or later, but $(PYTHON) is $$found." >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing glmjax and its tools into .venv (about a minute, once) ..."
	@$(PYTHON) -m venv .venv
	@$(PIP_INSTALL) -e '.[dev,train]'
	@touch $@

# Plain torch from PyPI is a CUDA build of several gigabytes on Linux. The CPU build satisfies the
# pin as well: where your pip finds it (PIP_INDEX_URL, PIP_FIND_LINKS), it is the one installed.
.venv/.parity: .venv/.installed
	@echo "Installing torch and transformers into .venv, to compare with (once) ..."
	@$(PIP_INSTALL) torch transformers
	@touch $@

.venv/.evaluate: .venv/.installed
	@echo "Installing an evaluation harness into .venv, to run against the server (once) ..."
	@$(PIP_INSTALL) -e '.[evaluate]'
	@touch $@

# The CUDA plugin without its libraries compiles for a GPU that is described to it. It has a place of
# its own: where it is installed and no GPU is there, every start of JAX prints complaints.
.venv-aot/.installed: .venv/.installed
	@echo "Installing a compiler for NVIDIA GPUs into .venv-aot (a minute, once) ..."
	@$(PYTHON) -m venv .venv-aot
	@.venv-aot/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
	  -e '.[dev,train,aot]'
	@touch $@
