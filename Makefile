# Everything starts here. A fresh machine needs Python >= 3.11 (with venv) and make.
#
#   make serve            set up, then serve a real model on http://127.0.0.1:8000
#   make test             set up, then check style and types, and test every part in minutes
#   make test-complete    the tests that take longer
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
# $(call pytest,NAME,MARKS,OPTIONS): tests with these marks; what took how long is kept by NAME.
pytest = $(RUN) pytest -m "$(2)" $(3) --durations 30 --junit-xml build/test-reports/$(1).xml

# Bytecode of our own packages and tests: every engine and replica is a process that loads them.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
# The order of prerequisites is the order of work, also under `make -j`.
.NOTPARALLEL:
.PHONY: help venv lock model serve test lint format test-unit test-browser test-engine test-cluster test-complete test-long soak load headline bench-serving gpu-acceptance browser compatibility canary docs docs-serve clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: ## Create .venv and install everything (ACCELERATOR=cpu or gpu)
	@$(PYTHON) tools/setup_env.py --accelerator $(ACCELERATOR)

lock: venv ## Write constraints.txt after a change of requirements (UPGRADE=1: newest versions)
	$(BIN)/python -m tools.make_constraints $(if $(UPGRADE),--upgrade)

model: venv ## Prepare the small models in the user's cache
	@$(RUN) memshare model
	@$(RUN) memshare model --pad-heads-to $(MODEL_TP)

serve: venv ## Serve a real model (CONFIG=configs/cluster.yaml); Ctrl-C stops it
	@$(RUN) memshare model
	@$(RUN) python tools/serve_local.py $(CONFIG)

test: venv model browser lint ## Check everything that minutes allow: style, types, and tests of every part
	$(call pytest,fast,not engine and not cluster and not complete,$(SPREAD))
	$(call pytest,real,(engine or cluster) and not complete,--timeout 900 $(SPREAD))

lint: venv ## Check style, types, what imports what, declared dependencies and the lock
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python tools/check_imports.py
	$(BIN)/deptry memshare cluster
	$(BIN)/deptry tests tools docs --exclude '\.venv' --ignore DEP002,DEP004
	$(BIN)/python -m tools.make_constraints --check

format: venv ## Fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-unit: venv ## Fast tests: no vLLM, no Ray cluster, no browser
	$(call pytest,unit,not engine and not cluster and not browser and not complete,$(SPREAD))

browser: venv ## Find a Chromium for tests of the live page, or install Debian's (as root)
	@$(RUN) python tools/setup_browser.py

test-browser: venv browser ## Tests of the live page in a real browser
	$(call pytest,browser,browser and not engine and not cluster and not complete)

test-engine: venv model ## Tests that start a real vLLM engine
	$(call pytest,engine,engine and not cluster and not complete,--timeout 600 $(SPREAD))

test-cluster: venv model ## Tests that start Ray
	$(call pytest,cluster,cluster and not complete,--timeout 900 $(SPREAD))

test-complete: venv model browser ## The tests that take longer: kills, tensor parallelism, benchmarks, long schedules
	$(call pytest,complete,complete,--timeout 900 $(SPREAD))
	SCHEDULER_TEST_STEPS=10000 $(RUN) pytest tests/memshare/engine/test_state_machine.py -k survives \
		--durations 30 --junit-xml build/test-reports/schedules.xml

compatibility: venv ## Enter what the last test runs proved into docs/compatibility.md
	$(BIN)/python -m tools.compatibility.record build/test-reports/*.xml
	$(BIN)/python -m tools.make_docs compatibility

canary: venv ## Say what MemShare touches that the newest vLLM has moved (downloads its wheel, 340 MB)
	$(BIN)/python -m tools.canary

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
	$(BIN)/memshare bench --workload recall --requests 24 --arms dense,watermark,compaction,twins,oldest,random \
		--budget 0.4 --memory 0.33 --dtype float32 --repeats 1 --json build/headline.json
	@$(BIN)/memshare plot arms build/headline.json --output docs/figures/headline.svg

bench-serving: venv model ## Our server beside vLLM's own, in alternation
	$(RUN) python -m tools.bench.serving

test-long: venv model ## Hours instead of minutes: random schedules, and bad input to a server
	SCHEDULER_TEST_STEPS=100000 $(RUN) pytest tests/memshare/engine/test_state_machine.py \
		tests/memshare/engine/compaction/test_schedules.py --timeout 3600
	FUZZ_TIMES=20 $(RUN) pytest tests/cluster -k "bad_input or any_grpc_message" --timeout 7200

gpu-acceptance: ## Measure on your GPUs and print a report (GPU_ARGS="--help" lists options)
	@$(PYTHON) tools/setup_env.py --accelerator gpu
	@HF_HUB_OFFLINE=0 $(RUN) python tools/gpu_acceptance.py $(GPU_ARGS)

clean: ## Remove caches, logs and builds
	rm -rf build dist .run .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info tools/lab_data/build tools/lab_data/*.egg-info
	find memshare cluster tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Also remove the virtual environment
	rm -rf .venv
