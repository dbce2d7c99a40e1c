# Everything runs in .venv, which the first target makes. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A stamp says what .venv holds; it is older than these files where they changed, and pip then runs again.
KEYS := pyproject.toml constraints.txt
DEMO_STAMP := $(VENV)/.installed-demo
DEV_STAMP := $(VENV)/.installed-dev
INSTALL = $(BIN)/python -m pip install -c constraints.txt -e

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup setup-demo weights demo test bench vllm-setup vllm-demo vllm-test check format-check lint types imports proto-lint proto-fresh proto format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-13s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info < (3, 11) and sys.exit(f"found Python {v}, expected 3.11 or later; name one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(DEMO_STAMP): $(KEYS) | $(BIN)/python
	$(INSTALL) '.[torch]'
	@touch $@

$(DEV_STAMP): $(KEYS) | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch $@ $(DEMO_STAMP)

setup: $(DEV_STAMP) ## make .venv with everything that development needs

setup-demo: $(DEMO_STAMP) ## make .venv with what the demo needs, and no more

# Needs either environment; the target that asks for the weights names which.
weights: | $(BIN)/python ## fetch, check and convert the default model's weights (once)
	@$(BIN)/python -c 'from guard.reader import weights; print("weights:", weights.resolve(weights.DEFAULT_MODEL, report=print))'

demo: setup-demo weights ## start Guard and send it a few prompts; ONCE=1 ends after them
	$(BIN)/guard demo $(if $(filter-out 0,$(ONCE)),--once)

test: setup weights ## run every test; ARGS="-k reader" goes to pytest
	$(BIN)/python -m pytest $(ARGS)

bench: setup weights ## run every benchmark suite of the CPU; ARGS="shapes scale" names some
	$(BIN)/python -m benchmarks $(ARGS)

# vLLM lives in .build/vllm, an environment of its own (3.4 GB): docs/vllm.md.
vllm-setup: | $(BIN)/python
	PYTHON=$(BIN)/python deploy/vllm/setup.sh $(if $(SAE_GUARD_VLLM),"$(SAE_GUARD_VLLM)")

vllm-demo: setup weights vllm-setup ## serve the default model by vLLM with the guard on, and show a stop; ONCE=1 ends after
	$(BIN)/python -m deploy.vllm.demo $(if $(filter-out 0,$(ONCE)),--once)

vllm-test: setup weights vllm-setup ## the tests that run a real vLLM (about 17 minutes); ARGS goes to pytest
	$(BIN)/python -m pytest tests/tap/vllm/test_engine.py tests/tap/vllm/test_restart.py $(ARGS)

check: setup format-check lint types imports proto-lint proto-fresh test ## all that a change must pass

format-check: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

proto-lint: setup
	$(BIN)/buf lint proto

proto-fresh: setup
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT \
	&& PYTHON="$(CURDIR)/$(BIN)/python" proto/generate.sh "$$fresh" \
	&& diff -r -x __pycache__ "$$fresh/guard/service/pb" guard/service/pb \
	&& echo 'generated code: fresh' \
	|| { echo 'generated code does not match proto/: run make proto'; exit 1; }

proto: setup ## regenerate guard/service/pb from proto/
	PYTHON="$(CURDIR)/$(BIN)/python" proto/generate.sh

format: setup ## format the code, and mend what ruff can mend safely
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean: ## remove .venv and every cache of the tree (the weights stay in the user's cache folder)
	rm -rf $(VENV) .build build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
