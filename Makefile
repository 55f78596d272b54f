# Every target makes .venv by itself when it is missing or pyproject.toml changed.
#
#   make parity   Flax against PyTorch, every case, a table       make train   the small RoPE language model
#   make test     the test suite                                  make bench   timings, each a ratio
#   make lint     ruff and the type checker                       make parity-golden   Flax against what PyTorch
#                                                                                      computed, without PyTorch
#
# PYTHON       the interpreter .venv is made with (3.11 or newer).
# TORCH_INDEX  another package index to take torch from, e.g. the one that PyTorch keeps for its CPU builds.
# EXTRAS       what .venv is made with: dev, or dev,plan to compile for TPUs too (libtpu, 700 MB).
# GOLDEN       what .venv-golden, which has no torch, is made with: golden, or golden,tpu (golden,cuda) for a device.
# ARGS         passed on: make parity ARGS="rope --report parity.html"

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
EXTRAS ?= dev
GOLDEN ?= golden
ARGS ?=

BIN = .venv/bin
READY = .venv/.ready

.PHONY: parity parity-golden test train bench lint
.DELETE_ON_ERROR:

parity: $(READY)
	$(BIN)/python -m parity $(ARGS)

parity-golden: .venv-golden/.ready
	.venv-golden/bin/python -m parity $(ARGS) --replay

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

.venv-golden/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-golden
	.venv-golden/bin/python -m pip install --quiet --upgrade pip
	.venv-golden/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$(GOLDEN)]'
	touch $@
