# Every target makes .venv by itself when it is missing or pyproject.toml changed.
#
#   make parity   Flax against PyTorch, every case, a table       make train   the small RoPE language model
#   make test     the test suite                                  make bench   timings, each a ratio
#   make lint     ruff and the type checker
#
# PYTHON       the interpreter .venv is made with (3.11 or newer).
# TORCH_INDEX  another package index to take torch from, e.g. the one that PyTorch keeps for its CPU builds.
# EXTRAS       what .venv is made with: dev, or dev,plan to compile for TPUs too (libtpu, 700 MB).
# ARGS         passed on: make parity ARGS="rope --report parity.html"

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
EXTRAS ?= dev
ARGS ?=

BIN = .venv/bin
READY = .venv/.ready

.PHONY: parity test train bench lint
.DELETE_ON_ERROR:

parity: $(READY)
	$(BIN)/python -m parity $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 $(ARGS)

train: $(READY)
	$(BIN)/python -m train.rope $(ARGS)

bench: $(READY)
	$(BIN)/python -m bench.rope $(ARGS)
	$(BIN)/python -m bench.feedback $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first, by its exact version: a bare `torch` can bring several GB of CUDA packages.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "PYTHON=$(PYTHON) is older than 3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
