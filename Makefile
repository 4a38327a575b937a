# Everything a clone can do. Each target first makes the virtual environment `.venv` by itself, once: GPU packages where
# `nvidia-smi -L` answers, CPU packages elsewhere, in the versions of requirements/{cpu,gpu}.txt.
# All paths are relative: the folder's own path may hold spaces.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
DEVICE := $(or $(DEVICE),$(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu))

BIN := .venv/bin
UV := $(BIN)/python requirements/uv.py
OVERRIDE_cpu := --override requirements/overrides.txt
INSTALLED := .venv/installed-$(DEVICE)
# One thread each: on a shared machine OpenMP's barriers cost up to ten times what more threads win.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# For one platform, not `--universal`: that reads one wheel's needs for all, and misses what only Linux wheels ask for.
COMPILE := pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) \
	pyproject.toml --extra share --extra train --extra dev

.PHONY: help demo test test-slow test-engines test-capture test-rest lint types fuzz chaos bench-codec bench-capture bench-scale \
	bench-loss bench-stream bench-step bench-quality lock venv clean

help: ## show this list
	@awk -F ': .*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' Makefile

demo: $(INSTALLED) ## the whole way once, on this machine (QUICK=1: a fifth of the size; OUTPUT=DIR: where to)
	$(BIN)/coldstill demo $(if $(filter-out 0,$(QUICK)),--quick) $(if $(OUTPUT),--output "$(OUTPUT)")

# Tests of engines have a process of their own: vLLM's start fails beside some web servers, and a process that held
# engines and Ray's driver has crashed at its end. Two at a time: most tests of the capture wait for others to start.
PARTS := test-engines test-capture test-rest
AT_ONCE := $(MAKE) --no-print-directory --jobs 2 --output-sync=line

test: lint types ## lint, types and all tests but the slow ones
	@$(AT_ONCE) MARK="not slow" $(PARTS)

test-slow: $(INSTALLED) ## the tests that take minutes
	@$(AT_ONCE) MARK="slow" $(PARTS)

test-engines: PART := tests/pipeline/teachers
test-capture: PART := tests/pipeline --ignore tests/pipeline/teachers
test-rest: PART := tests --ignore tests/pipeline
$(PARTS): $(INSTALLED)
	@$(PYTEST) -m "$(MARK)" $(PART)

lint: $(INSTALLED) ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## mypy
	$(BIN)/mypy

fuzz: $(INSTALLED) ## damaged datasets: each reads as before or has a named error (COUNT=10000, SEED=0)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --count $(or $(COUNT),10000) --seed $(or $(SEED),0)

chaos: $(INSTALLED) ## captures killed again and again: no row lost, none doubled (KILLS=200, VLLM=20, SEED=0)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --kills $(or $(KILLS),200) --vllm $(or $(VLLM),20) \
		--seed $(or $(SEED),0)

bench-codec: $(INSTALLED) ## bytes, speed and fidelity of the codec beside its rivals (QUICK=1)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.codec

bench-capture: $(INSTALLED) ## the tap beside its floor, vLLM's public path and transformers (QUICK=1)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.capture

bench-scale: $(INSTALLED) ## planning and resuming a million units, the driver's cost per unit, 1 to 16 workers (QUICK=1)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.scale

bench-loss: $(INSTALLED) ## sparse TAID beside cross-entropy and dense TAID: time and memory of a loss (QUICK=1)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.loss

bench-stream: $(INSTALLED) ## targets per second from shards to batches, local disk and S3 (QUICK=1)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.stream

bench-step: $(INSTALLED) ## a whole training step: TAID from a cache beside plain fine-tuning (QUICK=1)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.step

bench-quality: $(INSTALLED) ## what a cache costs in quality, by K and draws (DEMO=DIR of a finished demo; OUTPUT=DIR; QUICK=1)
	QUICK=$(QUICK) $(BIN)/python -m benchmarks.quality "$(or $(DEMO),demo_output)" "$(or $(OUTPUT),bench_quality)"

lock: $(BIN)/uv ## remake requirements/{cpu,gpu}.txt (UPGRADE=1: newest versions)
	$(UV) cpu $(COMPILE) --extra capture-cpu requirements/cpu.in $(OVERRIDE_cpu) \
		--output-file requirements/cpu.txt
	$(UV) gpu $(COMPILE) --extra capture requirements/gpu.in --output-file requirements/gpu.txt

venv: $(INSTALLED) ## only the virtual environment

clean: ## remove the virtual environment, builds and caches; what the demo wrote stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Locked for Python 3.11; a newer Python's own needs are resolved beside the pins.
$(INSTALLED): requirements/$(DEVICE).txt requirements/uv.py pyproject.toml | $(BIN)/uv
	@# Compiled now, on all cores: the demo starts nine processes, and an import of torch takes 15 s instead of 5 where
	@# nothing is cached.
	$(UV) $(DEVICE) pip install --compile-bytecode -r requirements/$(DEVICE).txt $(OVERRIDE_$(DEVICE))
	$(UV) $(DEVICE) pip install --no-deps --no-build-isolation -e .
	@touch $@

$(BIN)/uv:
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "No $(PYTHON) here. Install Python 3.11 to 3.14, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || { \
		echo "Coldstill needs Python 3.11 to 3.14; $(PYTHON) is $$("$(PYTHON)" -V 2>&1)." \
			"Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements/cpu.txt)"
