# Everything starts here. A fresh machine needs Python >= 3.11 (with venv) and make.
#
#   make serve    set up, then serve a real model on http://127.0.0.1:8000
#   make test     set up, then run every check and test
#
# Every target sets up what it needs; what is up to date is skipped at once.

PYTHON      ?= python3
# As .venv was made, if it was: `make ACCELERATOR=gpu venv` is said once.
ACCELERATOR ?= $(or $(lastword $(file < .venv/.memshare-base)),cpu)
CONFIG      ?= configs/cluster.yaml
MODEL_TP    ?= 2
GPU_ARGS    ?=
HOURS       ?= 1
WORKERS     ?= 2
UPGRADE     ?=

BIN := .venv/bin
# Runs a command of the venv with the process environment for local runs.
RUN := $(BIN)/python tools/runtime_env.py
# Test files share WORKERS processes. Engines take a core and 3 GB each.
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
# The order of prerequisites is the order of work, also under `make -j`.
.NOTPARALLEL:
.PHONY: help venv lock model serve test lint format test-unit test-browser test-engine test-cluster test-long soak load headline bench-serving gpu-acceptance browser docs docs-serve clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: ## Create .venv and install everything (ACCELERATOR=cpu or gpu)
	@$(PYTHON) tools/setup_env.py --accelerator $(ACCELERATOR)

lock: venv ## Write constraints.txt after a change of requirements (UPGRADE=1: newest versions)
	$(BIN)/python tools/make_constraints.py $(if $(UPGRADE),--upgrade)

model: venv ## Prepare the small models in the user's cache
	@$(RUN) memshare model
	@$(RUN) memshare model --pad-heads-to $(MODEL_TP)

serve: venv ## Serve a real model (CONFIG=configs/cluster.yaml); Ctrl-C stops it
	@$(RUN) memshare model
	@$(RUN) python tools/serve_local.py $(CONFIG)

test: venv model browser lint test-unit test-browser test-engine test-cluster ## Run every check and test

lint: venv ## Check style, types, what imports what, declared dependencies and the lock
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python tools/check_imports.py
	$(BIN)/deptry memshare cluster
	$(BIN)/deptry tests tools docs --exclude '\.venv' --ignore DEP002,DEP004
	$(BIN)/python tools/make_constraints.py --check

format: venv ## Fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-unit: venv ## Fast tests: no engine, no Ray, no browser
	$(RUN) pytest -m "not engine and not cluster and not browser" $(SPREAD)

browser: venv ## Find a Chromium for tests of the live page, or install Debian's (as root)
	@$(RUN) python tools/setup_browser.py

test-browser: venv browser ## Tests of the live page in a real browser
	$(RUN) pytest -m "browser and not cluster"

test-engine: venv model ## Tests that start a real vLLM engine
	$(RUN) pytest -m "engine and not cluster" --timeout 600 $(SPREAD)

test-cluster: venv model ## Tests that start Ray; those that measure times one by one
	$(RUN) pytest -m "cluster and not engine" --timeout 900 $(SPREAD)
	$(RUN) pytest -m "cluster and engine and not alone" --timeout 900 $(SPREAD)
	$(RUN) pytest -m "cluster and alone" --timeout 900

docs: venv ## Build the documentation site into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(RUN) python -m mkdocs --quiet build --strict
	@echo "open build/site/index.html"

docs-serve: venv ## Show the site on http://127.0.0.1:8001 while you write
	$(RUN) python -m mkdocs serve --dev-addr 127.0.0.1:8001

soak: venv model ## Kill parts of a cluster under load for HOURS=1; report in .run/soak
	$(RUN) python -m tools.bench.soak --hours $(HOURS)

load: venv model ## 256 short streams on two replicas for HOURS=1; report in .run/load
	$(RUN) python -m tools.bench.soak --load --hours $(HOURS) --output .run/load

headline: venv model ## Answers and preemptions of all policies, and the README's picture (about an hour)
	@mkdir -p build
	$(BIN)/memshare bench --workload problems --requests 100 --arms dense,twins,oldest,random --memory 0.33 \
		--dtype float32 --repeats 1 --json build/headline.json
	@$(BIN)/memshare plot arms build/headline.json --output docs/figures/headline.svg

bench-serving: venv model ## Our server beside vLLM's own, in alternation
	$(RUN) python -m tools.bench.serving

test-long: venv model ## Hours instead of minutes: random schedules, and bad input to a server
	SCHEDULER_TEST_STEPS=100000 $(RUN) pytest tests/memshare/engine/test_state_machine.py \
		tests/memshare/engine/test_compaction_schedules.py --timeout 3600
	FUZZ_TIMES=20 $(RUN) pytest tests/cluster -k "bad_input or any_grpc_message" --timeout 7200

gpu-acceptance: ## Measure on your GPUs and print a report (GPU_ARGS="--help" lists options)
	@$(PYTHON) tools/setup_env.py --accelerator gpu
	@HF_HUB_OFFLINE=0 $(RUN) python tools/gpu_acceptance.py $(GPU_ARGS)

clean: ## Remove caches, logs and builds
	rm -rf build dist .run .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info tools/lab_data/build tools/lab_data/*.egg-info
	find memshare cluster tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Also remove the virtual environment
	rm -rf .venv
