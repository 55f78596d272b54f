# Development commands; `make` alone lists them.
#
# Every target creates .venv if it is missing or if pyproject.toml or constraints.txt changed.
#
# PYTHON       interpreter for .venv (3.11 or newer)
# TORCH        requirement for torch, installed first (default: the version the tests use)
# TORCH_INDEX  package index for torch, e.g. PyTorch's own index of CPU builds
# CONSTRAINTS  file of pinned versions (default: constraints.txt); empty for the newest versions
# EXTRAS       extras installed in .venv: dev (default), or dev,plan to compile for TPUs too (libtpu, 700 MB)
# GOLDEN       extras installed in .venv-golden, which has no torch: golden, or golden,tpu (golden,cuda) for a device
# PAIRS        pairs of the zoo, by name (default: all): make zoo PAIRS="bert gpt2"
# MINUTES      time of the fuzzers (default: 60)
# ARGS         further arguments: make parity ARGS="rope --report parity.html"

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev
GOLDEN ?= golden
ARGS ?=
PAIRS ?=
MINUTES ?= 60

BIN = .venv/bin
READY = .venv/.ready

.PHONY: help parity parity-golden zoo test test-slow fuzz train docs site notebooks accelerator bench plans lint
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'

parity: $(READY) ## compare Flax with PyTorch: every case, one table
	$(BIN)/python -m parity $(ARGS)

parity-golden: .venv-golden/.ready ## compare Flax with recorded PyTorch results, in an environment without torch
	.venv-golden/bin/python -m parity $(ARGS) --replay

zoo: .venv-zoo/.ready ## compare the Flax ports of transformers 4.57.6 with their originals; writes docs/zoo.md
	.venv-zoo/bin/python -m examples.zoo $(PAIRS) $(ARGS)

test: $(READY) ## run the tests, except those marked slow
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-slow: $(READY) ## run the tests marked slow: compiled models, real processes, signals, the built wheel
	$(BIN)/python -m pytest -n 2 -m slow $(ARGS)

fuzz: $(READY) ## read changed files for MINUTES; a finding is saved in runs/fuzz with the line that repeats it
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(ARGS)

train: $(READY) ## train the small RoPE language model (8 minutes on two cores)
	$(BIN)/python -m train.rope $(ARGS)

docs: notebooks site ## run the notebooks, and build the site into site/, for a browser without a server: site/index.html

site: $(READY) ## build the site alone, with the outputs that the notebooks have
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build $(ARGS)
	$(BIN)/python -m docs.tools.links site

accelerator: $(READY) ## parity, tests and timings on a GPU (ARGS="--device tpu": a TPU); writes docs/accelerator.md
	$(BIN)/python -m bench.accelerator $(ARGS)

notebooks: $(READY) ## run the notebooks of examples/ and save their outputs, which the site shows
	$(BIN)/python -m docs.tools.notebooks $(ARGS)

bench: $(READY) ## run the commands of docs/bench.md and write their tables there (an hour)
	$(BIN)/python -m bench.page $(ARGS)

plans: $(READY) ## compile training steps for TPU slices (an hour; EXTRAS=dev,plan); writes docs/plans.md
	$(BIN)/python -m bench.plans $(ARGS)

lint: $(READY) ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first, by its exact version: an unpinned torch can bring several GB of CUDA packages.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "PYTHON=$(PYTHON) is older than 3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[$(EXTRAS)]'
	touch $@

.venv-golden/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-golden
	.venv-golden/bin/python -m pip install --quiet --upgrade pip
	.venv-golden/bin/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[$(GOLDEN)]'
	touch $@

# transformers 4.57 is the last version with Flax models; its own requirements replace three of the pins.
.venv-zoo/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/python -m pip install --quiet --upgrade pip
	.venv-zoo/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	grep -v -E '^(transformers|tokenizers|huggingface[-_]hub)==' $(or $(CONSTRAINTS),/dev/null) > .venv-zoo/constraints.txt || true
	.venv-zoo/bin/python -m pip install --quiet --constraint .venv-zoo/constraints.txt --editable '.[torch,golden]' transformers==4.57.6
	touch $@
