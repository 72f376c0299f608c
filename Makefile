# Every target sets up .venv first, when it is missing or older than setup.cfg or constraints.txt.
#   make demo   a cluster of two CPU ranks answers a batch job, loses a rank in the middle, and finishes
#   make test   the whole suite but the tests marked long
# PYTHON=... names another interpreter (3.11 or later).

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)

.PHONY: setup demo test test-long lint format bench proto clean

setup: $(STAMP)

$(STAMP): setup.cfg constraints.txt
	@test -n "$(PYTHON)" || { echo "echelon needs Python 3.11 or later; name one with make PYTHON=..." >&2; exit 1; }
	@echo "Installing into $(VENV) (minutes, the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m examples.demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not long"

test-long: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/scheduler.py
	$(BIN)/python benchmarks/coordinator_core.py
	$(BIN)/python benchmarks/coordinator_stream.py

proto: $(STAMP)
	$(BIN)/python protos/generate.py .

# All that the other targets leave behind, but not $(VENV): delete that folder to install anew.
clean:
	rm -rf .demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
