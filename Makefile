# make serve · make test · make check · make bench · make docs · make dist        (everything lives in .venv; nothing else is needed)

PYTHON ?= python3
PORT ?= 8080
HOST ?= 127.0.0.1
MODEL ?= models/demo
VENV := .venv
TPU_VENV := .venv-tpu
CLIENTS_VENV := .venv-clients
NODE_FOLDER := tests/clients/node
BIN := $(VENV)/bin
PACKAGES := core api backends/torch backends/cpu
# Installed for development only: their plugins import without the vendor's libraries. The TPU's needs another torch.
OTHER_BACKENDS := backends/cuda backends/rocm backends/xpu backends/gaudi backends/neuron
ALL_PACKAGES := $(PACKAGES) $(OTHER_BACKENDS) backends/tpu
MANIFESTS := pyproject.toml constraints.txt $(PACKAGES:%=%/pyproject.toml)
# Compiled while backends/cpu is installed.
NATIVE := $(wildcard backends/cpu/hatch_build.py backends/cpu/native/* backends/cpu/native/*/*)
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

# One computing thread for each test process: two would fight for the same cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help install serve test test-main test-clients test-kernels test-tpu check bench bench-batching docs dist pages clean

help:
	@sed -n '1p' Makefile

install: $(VENV)/.installed

$(VENV)/.installed: $(MANIFESTS) $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --constraint constraints.txt $(PACKAGES:%=--editable ./%) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed $(OTHER_BACKENDS:%=%/pyproject.toml)
	$(PIP) --constraint constraints.txt --group dev $(OTHER_BACKENDS:%=--editable ./%)
	$(PIP) --no-deps text-generation==0.7.0 # TGI's client asks for an older huggingface-hub, and works with ours
	@touch $@

serve: install
	$(BIN)/tokenplane serve --model-id $(MODEL) --backend cpu --hostname $(HOST) --port $(PORT)

test: test-main test-clients test-kernels test-tpu

test-main: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 $(ARGS)

# LangChain and LiteLLM want older clients than the rest, and no client needs a server in its environment.
test-clients: $(CLIENTS_VENV)/.installed $(VENV)/.installed-dev
	$(TEST_ENV) TOKENPLANE_PYTHON=$(CURDIR)/$(BIN)/python $(CLIENTS_VENV)/bin/python -m pytest -q tests/clients

$(CLIENTS_VENV)/.installed: tests/clients/requirements.txt $(NODE_FOLDER)/package.json
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/pip install --quiet --disable-pip-version-check --requirement tests/clients/requirements.txt
	if command -v npm >/dev/null; then cd $(NODE_FOLDER) && npm install --silent --no-package-lock --no-audit --no-fund; fi
	@touch $@

# Every Triton kernel, compiled for cards that are not here: prints registers, spills and shared memory, fails beyond limits.
test-kernels: $(VENV)/.installed-dev
	TRITON_CACHE_DIR=$$(mktemp -d) $(BIN)/python -m tokenplane_torch.triton.aot

# XLA's CPU device stands in for a TPU; torch-xla needs another torch, hence another environment.
$(TPU_VENV)/.installed: backends/tpu/tests/make_xla_cpu_env.py backends/tpu/pyproject.toml
	$(PYTHON) backends/tpu/tests/make_xla_cpu_env.py $(TPU_VENV)
	@touch $@

test-tpu: $(TPU_VENV)/.installed
	$(TEST_ENV) PJRT_DEVICE=CPU $(TPU_VENV)/bin/python -m pytest -q --tokenplane-backend tpu backends/tpu/tests

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=backends/tpu $(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/packaging/test_imports.py
	$(MAKE) docs

# Ours and each peer whose path is given (benchmarks/README.md): one table, a JSON file, a plot. ARGS=--quick: a few minutes.
bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.peers.compare $(ARGS)

bench-batching: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/concurrency.py $(ARGS)

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(PIP) --group bench
	@touch $@

dist: $(VENV)/.installed-dev
	rm -rf dist
	for package in . $(ALL_PACKAGES); do $(BIN)/python -m build --wheel --outdir dist $$package || exit 1; done
	$(TEST_ENV) $(BIN)/python -m pytest -q -m package_index tests/packaging

# The documents as a site; a broken link or a page that nobody links is an error.
docs: $(VENV)/.installed-dev
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs
	@echo "build/docs/index.html"

# The pages that are made from code, reports and runs: docs/api.md, flags.md, hardware.md, metrics.md.
pages: $(VENV)/.installed-dev
	for script in scripts/*_page.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(TPU_VENV) $(CLIENTS_VENV) $(NODE_FOLDER)/node_modules dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
