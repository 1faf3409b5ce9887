# Two commands on a bare machine: `make quickstart` and `make test`. Each makes its virtual environment and installs.

PYTHON ?= python3
VENV   ?= .venv
# One PyTorch release for everybody who starts from nothing: an open range would fetch whatever is newest today.
TORCH  ?= torch==2.13.0

# Tests use one core each. 0: all in one process, as a debugger wants it.
WORKERS ?= auto

BIN := $(VENV)/bin

.PHONY: quickstart test lint check docs clean

quickstart: $(VENV)/.installed
	$(BIN)/e2llm quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests scripts benchmarks examples
	$(BIN)/mypy

check: lint test

docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/docs.py

clean:
	rm -rf $(VENV) runs .e2llm-cache

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "e2llm needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -e '.[dev,gguf]'
	touch $@
