# Every target sets up .venv first, when it is missing or older than setup.cfg or constraints.txt.
#   make demo   two CPU ranks of a trained model answer a batch job, lose a rank in the middle, and show what it learnt
#   make test   the whole suite but the tests marked long
# PYTHON=... names another interpreter (3.11 or later).

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)

.PHONY: setup demo test test-long test-cluster test-rest mutants lint format bench proto clean

setup: $(STAMP)

$(STAMP): setup.cfg constraints.txt
	@test -n "$(PYTHON)" || { echo "echelon needs Python 3.11 or later; name one with make PYTHON=..." >&2; exit 1; }
	@echo "Installing into $(VENV) (minutes, the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m examples.demo

# Two runs side by side, for those that start clusters mostly wait; what they print comes when they end.
test: $(STAMP)
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-cluster test-rest LONG="and not long"

test-long: $(STAMP)
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-cluster test-rest

test-cluster: $(STAMP)
	$(BIN)/python -m pytest -m "cluster $(LONG)" tests/cluster

test-rest: $(STAMP)
	$(BIN)/python -m pytest -m "not cluster $(LONG)"

# Breaks one line of the production code after another; the simulation must turn red under each.
mutants: $(STAMP)
	$(BIN)/python -m tests.simulation.mutants

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
