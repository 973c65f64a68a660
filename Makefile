# What a contributor runs; CI runs the same. `make help` lists it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# An active virtual environment is used as it is; otherwise .venv is made here.
VENV   := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN    := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# One stamp per content of the two files that decide what is installed, and per place: an editable install points here.
STAMP  := $(VENV)/.likeness-$(shell { cat pyproject.toml constraints.txt; pwd; } | cksum | cut -d' ' -f1)
WORKERS ?= 2
PYTEST_ARGS ?=

# Threads of the number libraries: tests run side by side, and the number of threads changes the last bits of a training.
export OMP_NUM_THREADS ?= $(if $(filter test lint docs-check,$(MAKECMDGOALS)),1,)
ifeq ($(OMP_NUM_THREADS),)
unexport OMP_NUM_THREADS
endif

.PHONY: help setup demo test fix lint bench bench-maquette bench-faces bench-gate bench-groups bench-decoder bench-night bench-methods bench-acceptance docs-check slow

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(STAMP)  ## .venv (or the active virtual environment) with everything in it, once

$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x "$(BIN)/python" ]; then \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	    { echo "setup: Python 3.11 is needed, found '$(PYTHON)' ($$("$(PYTHON)" --version 2>&1)): install python3.11 and its venv module, or run 'make PYTHON=/path/to/python3.11 setup'" >&2; exit 1; }; \
	  echo "setup: making $(VENV)"; "$(PYTHON)" -m venv "$(VENV)"; \
	fi
	@"$(BIN)/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "setup: the virtual environment $(VENV) has $$("$(BIN)/python" --version), 3.11 is needed: leave it ('deactivate') and run make again" >&2; exit 1; }
	@echo "setup: installing the pinned packages into $(VENV); the first time that is 8 GB and takes about 3 minutes"
	@"$(BIN)/python" -m pip --version | grep -qE '^pip (2[6-9]|[3-9][0-9])\.' || "$(BIN)/python" -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=26'
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt 'setuptools>=77'
	@PYTHONWARNINGS=ignore "$(BIN)/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[service]' --group dev
	@rm -f "$(VENV)"/.likeness-*; touch $@
	@echo "setup: done"

demo: setup      ## personalise the shipped demo subject, ending with a verdict and a report
	@"$(BIN)/likeness" demo

test: lint       ## lint, then every quick test; the same in CI
	@"$(BIN)/python" -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

slow: setup      ## the tests that take minutes
	@"$(BIN)/python" -m pytest -m slow $(PYTEST_ARGS)

fix: setup       ## mend what ruff can mend
	@"$(BIN)/ruff" check --fix --quiet .

lint: setup      ## ruff, mypy --strict, the direction of imports
	@"$(BIN)/ruff" check --quiet .
	@"$(BIN)/mypy" --no-error-summary
	@"$(BIN)/lint-imports" --no-logo > .lint-imports.out 2>&1 || { cat .lint-imports.out; rm -f .lint-imports.out; exit 1; }; rm -f .lint-imports.out

bench: bench-faces bench-decoder bench-maquette bench-gate bench-night bench-groups   ## every benchmark; tables here, numbers and pictures under bench-results/

bench-maquette: setup   ## how well the maquette draws people, and the likeness of a personalised one
	@"$(BIN)/python" -m bench.maquette $(BENCH_ARGS)

bench-faces: setup      ## how well each face backend finds and recognises people, and what a photo costs
	@"$(BIN)/python" -m bench.faces $(BENCH_ARGS)

bench-decoder: setup    ## what tuning the VAE's decoder on the portraits is worth, on four users
	@"$(BIN)/python" -m bench.decoder $(BENCH_ARGS)

bench-methods: setup    ## the four methods beside the reference scripts of diffusers (REFERENCE_SCRIPTS=FOLDER), on four users: hours
	@"$(BIN)/python" -m bench.methods $(BENCH_ARGS)

bench-gate: setup       ## which planted defects the gate finds, and what it says of clean pictures
	@"$(BIN)/python" -m bench.gate $(BENCH_ARGS)

bench-night: setup      ## what orchestrating a night costs for each subject, without networks and photos: in process up to 1,000, through real servers and workers 20
	@"$(BIN)/python" -m bench.night $(BENCH_ARGS)
	@"$(BIN)/python" -m bench.night_workers

bench-groups: setup     ## whom the gate's recognisers know less well: errors by skin, age, sex, beard, glasses
	@"$(BIN)/python" -m bench.groups $(BENCH_ARGS)

bench-acceptance: setup ## how likely a set of photos is accepted: many sets through nights of the product; half an hour and more
	@"$(BIN)/python" -m bench.acceptance $(BENCH_ARGS)

docs-check: setup       ## every code block of README.md and docs/ runs, every link leads somewhere
	@"$(BIN)/python" tests/docs_check.py
