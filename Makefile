# The verbs of the project. Each makes what it needs in .venv, from Python 3.11 or later and the package index.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help demo test test-all compat check train clean

help:  ## list the verbs
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/base  ## explain a bundled scene for two of its objects
	$(BIN)/tsgb explain --out tsgb-out

test: .venv/full  ## run the tests, but for the slow ones
	$(BIN)/python -m pytest --quiet --numprocesses logical --maxprocesses 4 -m "not slow"

test-all: .venv/full  ## run all tests
	$(BIN)/python -m pytest --quiet --numprocesses logical --maxprocesses 4

compat:  ## run the engine's tests with the torch release TORCH, in an environment of its own: make compat TORCH=2.14.1
	@test -n "$(PYTHON)" || { echo "tsgb needs Python 3.11 or later; name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv-$(TORCH)
	.venv-$(TORCH)/bin/python -m pip --disable-pip-version-check install --quiet torch==$(TORCH) --editable '.[test]'
	.venv-$(TORCH)/bin/python -m pytest --quiet -m "not slow" tests/test_engine_*.py tests/test_rules_*.py tests/test_fusion.py

check: .venv/full  ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

train: .venv/base  ## train the bundled networks again
	$(BIN)/python training/train.py bundled --out src/tsgb/weights
	$(BIN)/python training/train.py bundled-vgg --out src/tsgb/weights

clean:  ## remove the environment and what the tools left
	rm -rf .venv .venv-* build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis tsgb-out

.venv/python:
	@test -n "$(PYTHON)" || { echo "tsgb needs Python 3.11 or later; name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/base: .venv/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

.venv/full: .venv/base
	$(PIP) --editable '.[torchvision,timm,bench,zennit,test,dev]'
	touch $@
