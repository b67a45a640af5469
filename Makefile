# Every target makes the environment it needs in .venv, from the versions in constraints.txt, and only when those change.
PYTHON ?= python3
ARGS ?=
VERSIONS ?=
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help train quick test peers lint format docs dist wheel bench clean

help: ## List the targets (the default)
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1	/' | expand -t 16
	@echo '  Times are of 2 CPU cores, once .venv is there; the first call of a target installs what it needs, 1 to 3 minutes.'

train: .venv/.examples ## Train a ResNet on CIFAR-10, 1 min (embedded images) to 12 min; ARGS="--help" lists the options
	$(BIN)/python examples/cifar10/train.py $(ARGS)

quick: .venv/.test ## Run a little of everything, for after every edit, 10 s
	$(BIN)/python -m pytest -q tests/test_quick.py $(ARGS)

test: .venv/.test ## Run the tests, three files at a time as some wait, 9 min; ARGS="-k NAME" picks some
	$(BIN)/python -m pytest --ignore=tests/peers --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

peers: .venv/.peers ## Run the tests against PyTorch, Flax, Haiku, Equinox and Keras, 5 min
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/peers jbn/linen.py jbn/nnx.py jbn/equinox.py $(ARGS)

lint: .venv/.dev .venv/.peers ## Check style and types, 20 s
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: .venv/.dev ## Mend what ruff can mend, 1 s
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/.docs ## Build the site in site/, strictly and without network, 2 s
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'site/index.html'

dist: .venv/.dev ## Build wheel and sdist in dist/, 10 s
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist > /dev/null
	@ls dist

wheel: dist ## Test the wheel with jax alone, from another folder, 6 min; VERSIONS="jax==0.10.0 jaxlib==0.10.0"
	tests/wheel.sh $(PYTHON) $(VERSIONS)

bench: .venv/.peers ## Run a benchmark: ARGS="NAME and its options"; without, list them
	$(BIN)/python benchmarks $(ARGS)

clean: ## Remove the environment and what was built
	rm -rf .venv site dist

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit(f"Python {v[0]}.{v[1]} found; 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@
