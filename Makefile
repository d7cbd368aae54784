# Everything sets itself up: a virtual environment in .venv, with the package and, for all but the demo, what its tests
# need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS := $(VENV)/.runs
MINUTES ?= 10
KERNELS ?= 7.3
QUICK := $(if $(ALL),,--quick)
ENGINE = $(shell for name in docker podman; do $$name info > /dev/null 2>&1 && echo $$name && break; done)

# Images of Python often set this. Each of the hundreds of interpreters that tests start would then compile mthp again,
# and pytest every test.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint types docs picture man changelog dist deb deb-check image image-check bench vm vm-fuzz clean

demo: $(RUNS)  ## mTHPs beside huge pages on two live processes
	$(BIN)/mthp demo

test: $(STAMP)  ## all tests but the slow ones; ALL=1: those too; ARGS='tests/unit -k plan': these
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(BIN)/python -m pytest $(QUICK) -n auto -m "not live" tests/unit tests/property tests/golden tests/e2e tests/web
	$(BIN)/python -m pytest $(QUICK) -m "live or vm" tests/e2e tests/live tests/vm
endif

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)  ## the documentation as a site, in build/site
	$(BIN)/mkdocs build

picture: $(STAMP)  ## the picture of the README, from a run of the demo
	$(BIN)/python docs/picture.py docs/demo.svg

man: $(STAMP)  ## man pages, in build/man
	$(BIN)/python docs/man.py build/man

changelog: $(RUNS)  ## CHANGELOG.md from the fragments in changes/; VERSION=0.2.0
	$(PIP) '.[release]'
	$(BIN)/towncrier build --yes --version $(or $(VERSION),$(error name the version: make changelog VERSION=0.2.0))

dist: $(RUNS)  ## wheel and sdist, in dist
	$(PIP) '.[release]'
	$(BIN)/python -m build

deb: $(STAMP)  ## a package for Debian 12 and later, in dist
	packaging/build_deb.sh $(abspath $(BIN)/python)

deb-check: deb  ## install that package in a bare Debian 12 and 13, and run it there (takes root, debootstrap and a mirror)
	for suite in bookworm trixie; do packaging/check_deb.sh $$(ls -t dist/*.deb | head -n 1) $$suite || exit 1; done

image:  ## a container image called mthp, with the version as a tag, by docker or podman: the first that works
	$(or $(ENGINE),$(error neither docker nor podman works here: start one, or name it: make image ENGINE=podman)) build \
	  -f packaging/container/Containerfile -t mthp -t mthp:$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/mthp/__init__.py) .

image-check: image  ## run the image, and collapse the memory of a process of this host from it (takes root)
	packaging/check_image.sh mthp '$(ENGINE)'

bench: $(STAMP)  ## every figure, as a ratio against a peer measured in the same run
	@for script in bench/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

vm: $(STAMP)  ## mthp's tests on kernels of the distribution, in virtual machines (QEMU)
	PYTHONPATH=tests $(BIN)/python -m vm matrix $(ARGS)

vm-fuzz: $(STAMP)  ## real kernels against the simulated machine, MINUTES=10 of random cases for each of KERNELS=7.3
	PYTHONPATH=tests $(BIN)/python -m vm fuzz --minutes $(MINUTES) $(KERNELS:%=-k %) $(ARGS)

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

# Debian has the module venv in python3, and what it needs (ensurepip) in another package.
define make-venv
@command -v $(PYTHON) >/dev/null || { echo "there is no $(PYTHON): install Python 3.11 or later, or name one: \
	make PYTHON=python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old: \
	mthp needs Python 3.11 or later: make PYTHON=python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make a virtual environment: install the \
	package python3-venv (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
$(PYTHON) -m venv $(VENV)
endef

$(RUNS): pyproject.toml
	$(make-venv)
	$(PIP) .
	touch $@

$(STAMP): pyproject.toml
	$(make-venv)
	$(PIP) '.[dev]'
	touch $(RUNS) $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
