# All tasks, for a machine with Python >= 3.11, make and a package index. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two versions of jax are supported: 0.10 is the last for Python 3.11, and 0.12 needs Python 3.12 or newer.
PYTHONS ?= python3.11 python3.12

.PHONY: help setup demo test quick lint types unit test-slow test-gpu mutations chaos corruption fuzz test-versions clean

help:  ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# Runs again only after setup.py or the version changed, so that a second `make test` needs no network.
$(VENV)/installed: setup.py rice_jax/version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is missing or older than 3.11; give another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

setup: $(VENV)/installed  ## make .venv with the package, editable, and all that the tests need

demo: setup  ## draw a shop, train, evaluate and show queries: build/demo/report.json and queries.png; ten minutes
	$(BIN)/python -m rice_jax.demo --output build/demo

test: lint types unit  ## check style and types and run the tests not marked slow, as the continuous build does

# One process for each core: what is left out are the tests that compile for minutes.
quick: setup  ## run the tests of input, losses, model and ranking that take seconds: under two minutes
	$(BIN)/python -m pytest -m "not slow and not compiles" --numprocesses auto --maxprocesses 4 --dist worksteal \
	  tests/input tests/losses tests/models tests/retrieval/test_ranking.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Each process starts with a part of the files and takes tests from the others when it has finished. More than four
# processes need much memory and save little time.
unit: setup
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: setup  ## run the tests marked slow
	$(BIN)/python -m pytest -m slow

test-gpu: setup  ## train, resume, evaluate, export and compute the golden figures on this machine's GPU; minutes
	$(BIN)/python -m tests.gpu

mutations: setup  ## make known mistakes in a copy of the code and list the tests that notice; most of an hour
	$(BIN)/python -m tests.mutations

chaos: setup  ## kill trainings at random moments and compare with undisturbed ones; most of an hour, can be resumed
	$(BIN)/python -m tests.chaos

corruption: setup  ## change 10,000 single bytes of a converted set: build/corruption/report.json; a minute
	$(BIN)/python -m tests.corruption --output build/corruption

fuzz: setup  ## fuzz all readers by hypothesis, and by atheris where it has a wheel, 10 minutes each: build/fuzz
	-$(BIN)/python -m pip install --quiet --only-binary :all: atheris  # has no wheel for every Python
	$(BIN)/python -m tests.fuzzing --output build/fuzz

test-versions:  ## run make test on each of PYTHONS, each in its own environment
	@for python in $(PYTHONS); do \
	  $$python -c '' 2> /dev/null || { echo "error: $$python is missing; install it, or name others: make test-versions PYTHONS='python3.11 python3.13'" >&2; exit 1; }; \
	done
	@for python in $(PYTHONS); do \
	  echo "== $$python"; $(MAKE) --no-print-directory test PYTHON=$$python VENV=.venv-versions/$$(basename $$python) || exit 1; \
	done

clean:  ## remove environments, builds and caches
	rm -rf .venv .venv-versions build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
