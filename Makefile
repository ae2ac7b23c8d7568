# The short list of commands. `make` alone prints it. Needs only make and a python3 of 3.11 to 3.13.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory --no-builtin-rules

PYTHON ?= python3
DATA ?= simulator
OUT ?= out
SITES ?= loopback
FAULTS ?=
ARGS ?=

BIN := .venv/bin
UV := .tools/uv/bin/uv
PARTS := rankbridge infra policy loadtests workloads tests

.PHONY: help setup rehearse faults test check format bench lock clean distclean system-tools acceptance

help: ## this list
	@echo "usage: make COMMAND [NAME=value ...]"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo "rehearse and test set up the machine themselves. .venv/bin/rankbridge --help has the single steps."

setup: ## .tools/ and .venv/ from the locks; nothing is done twice
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no $(PYTHON) on this machine" >&2; \
	  echo "  remedy: install it (Debian, Ubuntu: \`apt install python3 python3-venv\`)" >&2; exit 2; }
	@$(PYTHON) -I rankbridge/bootstrap.py

rehearse: setup ## data to verdict; DATA=online-retail=PATH OUT=out ARGS="--rate 60 ..."
	@$(EMULATOR) install --uv $(UV) || echo "going on without LocalStack; what needs it will say so" >&2
	@$(BIN)/rankbridge rehearse --data "$(DATA)" --out "$(OUT)" --sites "$(SITES)" $(ARGS)

faults: setup ## plant faults under load and judge them; FAULTS=F1,F8 SITES=netns (real tunnels, root) OUT=out
	@$(EMULATOR) install --uv $(UV) || echo "going on without LocalStack; what needs it will say so" >&2
	@$(BIN)/rankbridge faults --faults "$(FAULTS)" --out "$(OUT)" $(if $(filter netns,$(SITES)),--real-tunnels) $(ARGS)

# Two workers, a file stays with one of them: its fixtures are started once. What hangs fails, and says where.
test: setup ## every test, real parts too; ARGS="-k name", one by one with ARGS="-n 0"
	@$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --timeout 600 $(ARGS)

check: setup ## lint, format, types, direction of imports
	@$(BIN)/ruff check $(PARTS)
	@$(BIN)/ruff format --check $(PARTS)
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup ## mend what ruff can mend
	@$(BIN)/ruff check --fix $(PARTS)
	@$(BIN)/ruff format $(PARTS)

bench: setup ## the gateway's own time against its bare parts; ARGS="..."
	@$(BIN)/rankbridge bench --out "$(OUT)" $(ARGS)

lock: setup ## resolve requirements/*.in anew, with hashes
	@for name in tools tritonserver triton-python project; do \
	  echo "lock: requirements/$$name.in"; \
	  $(UV) pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header \
	    $(if $(UPGRADE),--upgrade) requirements/$$name.in -o requirements/$$name.txt; done
	@$(MAKE) lock-images

acceptance: setup ## what is promised, on this machine: checks, tests, green and red rehearsals (about 45 min)
	@.ci/acceptance

system-tools: infra-tools ## Debian packages that the suites need (root)
	@if $(PYTHON) -c "import ensurepip, venv" 2>/dev/null; then echo "system tools: nothing is missing"; \
	else apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv; fi

clean: ## stop every process, remove state and results; keeps the environments
	@if [ -x $(BIN)/rankbridge ]; then $(BIN)/rankbridge down; fi
	@rm -rf .rankbridge out build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

distclean: clean ## as clean, and remove the environments too
	@rm -rf .venv .tools

include infra/infra.mk
include images/images.mk
