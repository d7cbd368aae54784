# Everything sets itself up: a virtual environment in .venv, with the package and what its tests need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MINUTES ?= 10
KERNELS ?= 7.3

.PHONY: demo test lint types bench vm vm-fuzz clean

demo: $(STAMP)  ## the whole story on a live process
	$(BIN)/mthp demo

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)  ## every figure, as a ratio against a peer measured in the same run
	@for script in bench/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

vm: $(STAMP)  ## mthp's tests on kernels of the distribution, in virtual machines (QEMU)
	PYTHONPATH=tests $(BIN)/python -m vm matrix $(ARGS)

vm-fuzz: $(STAMP)  ## real kernels against the simulated machine, MINUTES=10 of random cases for each of KERNELS=7.3
	PYTHONPATH=tests $(BIN)/python -m vm fuzz --minutes $(MINUTES) $(KERNELS:%=-k %) $(ARGS)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "mthp needs Python 3.11 or later: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
