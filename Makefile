# Every target makes the environment it needs in .venv, from the versions in constraints.txt, and only when those change.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help train test peers lint format bench clean

help: ## List the targets (the default)
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1	/' | expand -t 16

train: .venv/.examples ## Train a ResNet on CIFAR-10; ARGS="--help" lists the options
	$(BIN)/python examples/cifar10/train.py $(ARGS)

test: .venv/.test ## Run the tests, two files at a time
	$(BIN)/python -m pytest --ignore=tests/peers --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

peers: .venv/.peers ## Run the tests against PyTorch, Flax, Haiku, Equinox and Keras
	$(BIN)/python -m pytest tests/peers jbn/linen.py jbn/nnx.py jbn/equinox.py $(ARGS)

lint: .venv/.dev .venv/.peers ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: .venv/.dev ## Mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/.peers ## Run the benchmarks; ARGS="--help" lists the options
	$(BIN)/python benchmarks/differences.py
	$(BIN)/python benchmarks/operation.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/resnet_peer.py $(ARGS)

clean: ## Remove the environment
	rm -rf .venv

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit(f"Python {v[0]}.{v[1]} found; 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@
