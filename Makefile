# make train       train the default model, on the text that ships with the project
# make test        all tests; make test-fast: without those of make smoke, the slow ones and the longest of the kernels; make smoke:
#                  the least that must work, for every config, in two minutes
# make lint        style and types
# make docs        the documentation as a site, in site/
# make clean       remove the virtual environment and caches; runs/ and data/ stay
#
# PYTHON=python3.12 picks the interpreter (3.11 or later). REQUIREMENTS=requirements-gpu.txt installs jax for NVIDIA GPUs,
# requirements-tpu.txt for TPUs. WORKERS: processes that run tests; each takes whole files, whose tests share what is
# compiled. PYTEST: more arguments for pytest.

PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements.txt
WORKERS ?= 2
BIN := $(VENV)/bin
# left out by make test-fast: kernels in an interpreter, on several devices, and on random shapes
LONG_KERNELS := $(foreach kind,tpu gpu sharded random,--ignore-glob=tests/kernels/*_$(kind).py)

train: $(VENV)/.installed
	$(BIN)/python train.py --config=configs/densemamba.py --config.evaluation.limit=512 --workdir=runs/densemamba

test: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST)

test-fast: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not smoke" $(LONG_KERNELS) $(PYTEST)

smoke: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) -m smoke $(PYTEST)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/. Without a network: nothing is fetched.
docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build site seqmodels.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# changes when REQUIREMENTS names another file than at the last install
$(VENV)/.requirements: FORCE | $(BIN)/python
	@echo '$(REQUIREMENTS)' | cmp -s - $@ || echo '$(REQUIREMENTS)' > $@

$(VENV)/.installed: requirements.txt $(REQUIREMENTS) $(VENV)/.requirements | $(BIN)/python
	$(BIN)/python -m pip install --quiet --requirement $(REQUIREMENTS)
	@touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --requirement requirements-test.txt
	@touch $@

FORCE:

$(VENV)/.installed-docs: requirements-docs.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --requirement requirements-docs.txt
	@touch $@

.PHONY: train test test-fast smoke lint docs clean FORCE
.DEFAULT_GOAL := train
