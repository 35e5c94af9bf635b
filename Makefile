# Set-up, demo, tests. `make venv` does the whole set-up; the other targets call it first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
SGLANG := sglang==0.5.23
BIN := .venv/bin
STAMP := .venv/.set-up

# torch's threads spin: more than one per process starves the server on a small machine.
CPU_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: venv demo test test-full test-stacks test-sdks lint format bench bench-frontier \
	bench-serving kernels-report bench-kernels dist-check clean
.DEFAULT_GOAL := venv

venv: $(STAMP)

$(STAMP): setup.py scripts/cpu/install.py scripts/cpu/requirements.txt scripts/cpu/sgl_kernel.py \
		scripts/cpu/torchvision_schemas.py
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@if nvidia-smi -L >/dev/null 2>&1; then \
		$(BIN)/python -m pip install "$(SGLANG)" --editable ".[dev,minilm,bench]"; \
	else \
		$(BIN)/python scripts/cpu/install.py; \
	fi
	@touch $@

demo: venv
	$(BIN)/sglang-deepprune demo

test: venv
	$(CPU_ENV) $(BIN)/pytest -m "not slow and not gpu and not modes and not stacks"

test-full: venv
	$(CPU_ENV) $(BIN)/pytest -m "not stacks"

# The recipes of docs/recipes/, with other people's packages: each installed once, under .stacks/.
test-stacks: venv
	$(BIN)/python -m tests.stacks.environments
	$(CPU_ENV) $(BIN)/pytest -m stacks -rs tests/stacks

# Those of them that CI runs: OpenAI's SDKs.
test-sdks: venv
	$(BIN)/python -m tests.stacks.environments openai-python openai-node
	$(CPU_ENV) $(BIN)/pytest -m stacks -rs tests/stacks/test_openai.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Recordings are not part of the project: name yours by DEEPPRUNE_TRACES and DEEPPRUNE_BRANCHES.
bench: venv
	$(CPU_ENV) $(BIN)/python -m benchmarks.replay

bench-frontier: venv
	$(CPU_ENV) $(BIN)/python -m benchmarks.frontier --json benchmarks/results/frontier.json

# A few hours on an otherwise idle machine; it goes on where it stopped.
bench-serving: venv
	$(CPU_ENV) $(BIN)/python -m benchmarks.serving --json benchmarks/results/serving.json

# Registers, spills and shared memory of each kernel, for three targets; needs no GPU.
kernels-report: venv
	$(CPU_ENV) $(BIN)/python -m benchmarks.kernels_report --json benchmarks/results/kernels_report.json

# Needs a GPU.
bench-kernels: venv
	$(BIN)/python -m benchmarks.bench_kernels --json benchmarks/results/bench_kernels.json

dist-check: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/dist_check.sh

clean:
	rm -rf .venv .stacks build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
