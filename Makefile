# Everything a machine with Python >= 3.11, make and a package index needs. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The two lines of jax that are supported: 0.10 is the last for Python 3.11, 0.12 needs 3.12 or newer.
PYTHONS ?= python3.11 python3.12

.PHONY: help setup demo test lint types unit test-slow mutations chaos corruption fuzz test-versions clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# Anew only when what is to be installed changed, so that a second `make test` needs no network.
$(VENV)/installed: setup.py rice_jax/version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is missing or older than 3.11; give another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

setup: $(VENV)/installed  ## a virtual environment in .venv with the package, editable, and what tests need

demo: setup  ## a drawn shop, trained on and looked at: build/demo/report.json and queries.png
	$(BIN)/python -m rice_jax.demo --output build/demo

test: lint types unit  ## style, types and the tests that take minutes: what the continuous build runs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Each process begins with a part of the files and takes tests from others when it is done. More than four take more memory
# than they are worth.
unit: setup
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: setup  ## the tests marked slow
	$(BIN)/python -m pytest -m slow

mutations: setup  ## mistakes made on purpose in a copy of the code, and which tests notice; most of an hour
	$(BIN)/python -m tests.mutations

chaos: setup  ## training killed at random moments, against undisturbed runs; most of an hour, goes on where it stopped
	$(BIN)/python -m tests.chaos

corruption: setup  ## 10,000 single bytes of a converted set changed: build/corruption/report.json; a minute
	$(BIN)/python -m tests.corruption --output build/corruption

fuzz: setup  ## hypothesis and, where it has a wheel, atheris against parsers and readers, 10 minutes each: build/fuzz
	-$(BIN)/python -m pip install --quiet --only-binary :all: atheris  # has no wheel for every Python
	$(BIN)/python -m tests.fuzzing --output build/fuzz

test-versions:  ## the tests on each of PYTHONS, in an environment of its own each
	@for python in $(PYTHONS); do \
	  $$python -c '' 2> /dev/null || { echo "error: $$python is missing; install it, or name others: make test-versions PYTHONS='python3.11 python3.13'" >&2; exit 1; }; \
	done
	@for python in $(PYTHONS); do \
	  echo "== $$python"; $(MAKE) --no-print-directory test PYTHON=$$python VENV=.venv-versions/$$(basename $$python) || exit 1; \
	done

clean:  ## all that can be made again
	rm -rf .venv .venv-versions build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
