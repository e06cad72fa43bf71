# device: cpu or gpu; the one that .venv has, else gpu where nvidia-smi answers.
# PYTHON: the interpreter to build .venv from, 3.11 to 3.13.
ifndef device
device := $(patsubst .venv/.stamp-%,%,$(firstword $(wildcard .venv/.stamp-cpu .venv/.stamp-gpu)))
endif
ifeq ($(device),)
device := $(if $(shell nvidia-smi -L 2>/dev/null),gpu,cpu)
endif
ifeq ($(filter cpu gpu,$(device)),)
$(error device=$(device) is neither cpu nor gpu)
endif

# Ray's hook for `uv run` would ship this folder to every worker and run uv again there.
export RAY_ENABLE_UV_RUN_RUNTIME_ENV := 0

python := .venv/bin/python
quote = '$(subst ','\'',$(1))'
# exec: a signal to make reaches Python itself, and make waits for its clean end.
orchestrator = @exec $(python) -m orchestrator
job = $(if $(conf),job=$(call quote,$(conf)))

# An environment that was moved with its folder, or whose set-up was cut short, is not used.
stale := $(shell [ ! -d .venv ] || { [ ! -e .venv/.unfinished ] && [ -x $(python) ] && \
    [ "$$(cat .venv/.location 2>/dev/null)" = "$$(pwd -P)" ]; } || echo stale)

.PHONY: help setup train up down plan doctor config verify chaos sweep ui serve submit runs test bench lint types lock clean FORCE
.DEFAULT_GOAL := help

help: ## Print these lines
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: .venv/.stamp-$(device) ## Prepare .venv (device=cpu|gpu); the others do so themselves
	@echo ".venv is ready ($(device))"

train: .venv/.stamp-$(device) ## Train a job: conf=mnist args="strategy.num_workers=2"
	$(orchestrator) train $(job) $(args)

up: .venv/.stamp-$(device) ## Keep a local Ray at hand: train then begins in a breath
	$(orchestrator) up $(args)

down: .venv/.stamp-$(device) ## End what `make up` keeps
	$(orchestrator) down

plan: .venv/.stamp-$(device) ## Print what a training would do: conf=mnist
	$(orchestrator) plan $(job) $(args)

doctor: .venv/.stamp-$(device) ## Check all that can be checked before a step: conf=mnist
	$(orchestrator) doctor $(job) $(args)

config: .venv/.stamp-$(device) ## Print the resolved configuration of a job: conf=mnist
	$(orchestrator) config $(job) $(args)

verify: .venv/.stamp-$(device) ## Prove that N workers compute what one computes: conf=mnist
	$(orchestrator) verify $(job) $(args)

chaos: .venv/.stamp-$(device) ## Prove that failures change nothing: conf=mnist
	$(orchestrator) chaos $(job) $(args)

sweep: .venv/.stamp-$(device) ## Train all combinations: args="train.seed=1,2,3"
	$(orchestrator) sweep $(job) $(args)

ui: .venv/.stamp-$(device) ## Open the runs in MLflow's web interface
	$(orchestrator) ui $(args)

serve: .venv/.stamp-$(device) ## Let a model answer over HTTP: run=mnist/RUN or model=NAME@ALIAS
	$(orchestrator) serve $(foreach key,run model port host,\
	    $(if $($(key)),$(key)=$(call quote,$($(key))))) $(args)

submit: .venv/.stamp-$(device) ## Train on a Ray cluster: conf=mnist address=http://head:8265
	$(orchestrator) submit $(job) $(if $(address),cluster.address=$(call quote,$(address))) $(args)

runs: .venv/.stamp-$(device) ## Look at runs and stop them: args="status mnist/RUN"
	$(orchestrator) runs $(if $(args),$(args),list)

# These keep a processor busy while those of tests/cluster wait for processes, about as long.
beside := train verify jobs spec track
# These take the time.
alone := $(patsubst %,tests/faults/test_%.py,detection kills leaving start_and_memory storage)
everything := --ignore=tests/gpu -p tests.beside $(beside:%=--beside=tests/%) $(alone:%=--alone=%)

test: lint types ## Lint, types, all tests but tests/gpu (args= names others)
	@exec $(python) -m pytest --durations=10 -rs $(or $(args),$(everything))

bench: .venv/.stamp-dev ## Measure speed against loops by hand: only=mnist-graph pairs=5
	@exec $(python) -m benchmarks $(foreach key,only pairs seconds fresh list,\
	    $(if $($(key)),$(key)=$(call quote,$($(key))))) $(args)

lint: .venv/.stamp-dev ## Check style and format with ruff
	@$(python) -m ruff check --quiet
	@$(python) -m ruff format --check --quiet || { \
	    echo "not formatted as ruff does it; '$(python) -m ruff format' mends it" >&2; exit 1; }

types: .venv/.stamp-dev ## Check types with mypy
	@$(python) -m mypy

lock: ## Resolve requirements/*.lock again (args=--upgrade: newest)
	@sh requirements/setup.sh lock $(args)

clean: ## Remove .venv and caches; runs and data stay
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	@find . -name __pycache__ -prune -exec rm -rf {} +

# A stamp is the mark of a finished set-up; it is made anew when its lock changes.
.venv/.stamp-$(device): requirements/$(device).lock $(if $(stale),FORCE)
	@sh requirements/setup.sh $(device)
	@touch $@

.venv/.stamp-dev: requirements/dev.lock .venv/.stamp-$(device)
	@sh requirements/setup.sh dev
	@touch $@
