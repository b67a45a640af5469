# Every target makes the environment it needs in VENV, from the versions in constraints.txt, and only when those change.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
VERSIONS ?=
TESTS ?=
BASE ?= main
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help train test quick faults peers lint format docs dist wheel goldens bench same clean runs agree

help: ## List the targets (the default)
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1	/' | expand -t 16
	@echo '  Times are of 2 CPU cores, once .venv is there; the first call of a target installs what it needs, 1 to 3 minutes.'

train: $(VENV)/.examples ## Train a ResNet on CIFAR-10, 1 min (embedded images) to 12 min; ARGS="--help" lists the options
	$(BIN)/python examples/cifar10/train.py $(ARGS)

test: $(VENV)/.test ## Run the tests, three files at a time as some wait, 5 min, 2 the second time; ARGS="-k NAME" picks some
	$(BIN)/python -m pytest --ignore=tests/peers --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

quick: $(VENV)/.test ## Run a little of everything, after every edit, 15 s
	$(BIN)/python -m pytest --quiet tests/test_quick.py $(ARGS)

faults: $(VENV)/.test ## Plant faults in jbn/ and see the tests fail, 6 min; ARGS="--quick", "--peers" or "-k WORD"
	$(BIN)/python tests/faults.py $(ARGS)

peers: $(VENV)/.peers ## Run the tests against PyTorch, Flax, Haiku, Equinox and Keras, 5 min
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(or $(TESTS),tests/peers jbn/linen.py jbn/nnx.py jbn/equinox.py) $(ARGS)

lint: $(VENV)/.dev $(VENV)/.peers ## Check style and types, 20 s
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev ## Mend what ruff can mend, 1 s
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.docs ## Build the site in site/, strictly and without network, 2 s
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'site/index.html'

dist: $(VENV)/.dev ## Build wheel and sdist in dist/, 10 s
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist > /dev/null
	@ls dist

wheel: runs dist ## Test the wheel with jax alone, from another folder, 6 min; VERSIONS="jax==0.10.0 jaxlib==0.10.0" TESTS="FILES"
	TESTS="$(TESTS)" tests/wheel.sh $(PYTHON) $(VERSIONS)

goldens: ## Write tests/golden/libraries again, each library in its own environment, minutes each; ARGS="paddle mxnet" picks
	tests/golden/make.sh $(ARGS)

bench: $(VENV)/.peers ## Run a benchmark: ARGS="NAME and its options"; without, list them
	$(BIN)/python benchmarks $(ARGS)

same: $(VENV)/.test ## Compare what this tree computes, says and compiles to with a git revision, 2 min: BASE=main ARGS="--help"
	$(BIN)/python benchmarks/same.py $(BASE) $(ARGS)

clean: ## Remove the environment and what was built
	rm -rf $(VENV) site dist

runs: # PYTHON, asked for where an environment has to be made of it
	@$(PYTHON) -c '' 2> /dev/null || { echo '$(PYTHON) does not run here; give one that does: make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit(f"$(PYTHON) is Python {v[0]}.{v[1]}; 3.11 or newer is needed: make PYTHON=/path/to/python3.12")'

$(BIN)/python: | runs
	$(PYTHON) -m venv $(VENV)

# A PYTHON that is given has to be the one of the environment. That of `make wheel` has an environment of its own.
GIVEN := $(if $(filter wheel,$(MAKECMDGOALS)),,$(filter-out file,$(origin PYTHON)))

agree: | runs $(BIN)/python
	@version='import sys; print("Python %d.%d" % sys.version_info[:2])'; \
	asked=$$($(PYTHON) -c "$$version"); there=$$($(BIN)/python -c "$$version"); [ "$$asked" = "$$there" ] || { \
	echo "$(VENV) has $$there, and $(PYTHON) is $$asked. Beside it: make VENV=.venv-$${asked#Python } PYTHON=$(PYTHON) ...; in its place: make clean first." >&2; exit 1; }

$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python $(if $(GIVEN),agree)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@
