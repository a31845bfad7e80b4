# Rushes. `make demo` sets up all it needs and shows the whole way; `make help` lists the rest.
# State lives under RUSHES_HOME (default ~/.local/share/rushes): `make demo RUSHES_HOME=/some/folder`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 4
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help demo eval bench chaos up down check test lint types clean

help:                   ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.set-up   ## set up, start the stack, render examples/prompts.jsonl, say where to look
	@$(BIN)/rushes demo $(ARGS)

eval: $(VENV)/.set-up   ## set up, measure what mini can do, print the tables (ARGS='--prompts 64 --modes 0')
	@$(BIN)/rushes eval $(ARGS)

bench: $(VENV)/.set-up  ## set up, measure engine, platform and planner, print the tables (ARGS='step')
	@$(BIN)/python -m tests.bench $(ARGS)

chaos: $(VENV)/.set-up-dev  ## long fuzzing, disks, cables, two hosts, then a hundred faults: hours (ARGS='--faults 8')
	HYPOTHESIS_PROFILE=chaos $(BIN)/python -m pytest -q --timeout 3600 tests/generative/test_prompts_laws.py tests/generative/test_request_laws.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m chaos
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos $(ARGS)

up: $(VENV)/.set-up     ## start the local stack (or mend it)
	@$(BIN)/rushes up

down:                   ## stop the local stack; nothing is left running
	@if test -x $(BIN)/rushes; then $(BIN)/rushes down; fi

check: lint types       ## lint, contracts, types, unit and generative tests, in two minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup tests/unit tests/generative

# Four test processes on two cores, since stacks and servers often wait; more threads inside each would only fight.
test: $(VENV)/.set-up-dev   ## every test but those of `make chaos`, in ten minutes (JOBS=4, ARGS='-k store')
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

lint: $(VENV)/.set-up-dev   ## ruff, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.set-up-dev  ## pyright over flows, model, db and infra
	$(BIN)/pyright

clean: down             ## stop the stack and remove what set-up and the tools made (never RUSHES_HOME)
	rm -rf $(VENV) *.egg-info build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find flows model db infra tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written only when its install has finished, so an interrupted one is taken up again.
$(VENV)/.set-up: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing Rushes into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.set-up-dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing Rushes and its test tools into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.set-up

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Rushes needs Python 3.11 or newer; $(PYTHON) is older. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
