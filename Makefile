# Commands of the project. Everything runs in .venv, which the first target makes and later targets reuse.
#   PYTHON=python3.12           another Python (3.10 or newer)
#   FUSED_MEGATRON_CUDA=on|off  require or skip the CUDA kernels (auto: build them for a GPU with nvcc; see setup.py)
#   ARGS="..."                  further arguments for train, test and bench
PYTHON ?= python3
FUSED_MEGATRON_CUDA ?= auto
CONFIG ?= examples/gpt_tiny.toml
RANKS ?= 2
export FUSED_MEGATRON_CUDA

BIN := .venv/bin
BEGUN := $(shell date +%s)
# pip uses the network only for packages, asks nothing, and prints nothing unless it fails.
QUIET := -qq --no-input --disable-pip-version-check
PIP := $(BIN)/python -m pip install $(QUIET) --no-compile -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup train test wheels mutants lint types bench bench-context-parallel bench-end-to-end bench-experts bench-gpu bench-layers bench-models bench-node bench-overlap bench-pipeline bench-predicted bench-ring bench-save docs faults clean FORCE

help:
	@echo "make train   train a small GPT on 2 ranks ($(CONFIG))"
	@echo "make test    run the tests (ARGS='-m slow' runs the slow ones)"
	@echo "make mutants plant the mistakes of tests/mutations, one at a time, and check that a test fails"
	@echo "make lint    check faults and format (ruff)    make types   check types (mypy)"
	@echo "make bench   compare speeds on the CPU         make bench-gpu   compare them on a GPU"
	@echo "make bench-end-to-end   compare training steps with torch, megatron-core and Hugging Face in every layout"
	@echo "make bench-context-parallel   compare the methods of context-parallel attention on 2 ranks"
	@echo "make bench-experts   compare a layer of experts with its products, Hugging Face, and two ranks"
	@echo "make bench-layers    compare tensor-parallel layers with DTensor"
	@echo "make bench-models    compare models of transformers before and after replace_modules"
	@echo "make bench-node      measure weak scaling of the papers' GPTs on all GPUs of this machine"
	@echo "make bench-overlap   measure the gain from overlap on a slow link (root)"
	@echo "make bench-pipeline  measure the bubble of every pipeline schedule"
	@echo "make bench-predicted measure 40 layouts of a GPT beside their predicted steps"
	@echo "make bench-ring      measure the overlap of a context-parallel ring on a slow link (root)"
	@echo "make bench-save      measure how long training waits for a checkpoint"
	@echo "make faults  inject faults into checkpoints, datasets and ranks, of ours and of others (docs/reliability.md)"
	@echo "make docs    build the site into build/site (the outputs of its commands are of today)"
	@echo "make setup   only install and build, with the tools of the tests"
	@echo "make wheels  build the wheel for all Python versions into dist/ (FUSED_MEGATRON_CUDA=off: without CUDA kernels)"
	@echo "make clean   remove .venv and everything built (runs/ stays)"

setup: .venv/built .venv/developed

train: .venv/built
	@echo "fused-megatron: training (set-up took $$(( $$(date +%s) - $(BEGUN) )) s)"
	@exec $(BIN)/python -m fused_megatron launch --nproc-per-node $(RANKS) train $(CONFIG) $(ARGS)

# Each worker gets whole files: tests start ranks of their own, and the tests of a file share its set-up. Files run in
# the order of the folders, so that tests/audit, with the longest tests, comes first. The time of one-off builds is
# reported separately. Compiled modules are kept even where PYTHONDONTWRITEBYTECODE is set: the tests start about a hundred
# processes that import the package, which would each compile it again.
test: .venv/built .venv/developed
	@$(BIN)/python -m fused_megatron.audit.cuda_emulation
	@echo "fused-megatron: set-up took $$(( $$(date +%s) - $(BEGUN) )) s; tests:"
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	    --durations 10 --durations-min 1 $(ARGS)

# One wheel for CPython 3.10 and later, with CPU and CUDA kernels. auditwheel finds the oldest glibc on which it loads,
# and writes it into the name. torch's own libraries stay outside: they are found in the process, which has loaded them.
wheels: export FUSED_MEGATRON_CUDA := $(if $(filter off,$(FUSED_MEGATRON_CUDA)),off,on)
wheels: .venv/built .venv/developed
	@rm -rf build/wheels
	@$(BIN)/python -m pip wheel $(QUIET) --no-build-isolation --no-deps --wheel-dir build/wheels .
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude "libtorch*" --exclude "libc10*" \
	    --wheel-dir dist build/wheels/*.whl
	@ls dist/*.whl

# Plants mistakes in a copy of the tree, one at a time; the tests must find each (tests/mutations).
mutants: .venv/built .venv/developed
	@$(BIN)/python tests/mutations/run.py $(ARGS)

lint: .venv/developed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: .venv/developed
	@$(BIN)/mypy

bench: .venv/built .venv/developed
	@$(BIN)/python benchmarks/run_all.py $(ARGS)

bench-gpu: .venv/built .venv/developed
	@$(BIN)/python benchmarks/run_all.py --gpu $(ARGS)

bench-context-parallel: .venv/built .venv/developed
	@$(BIN)/python benchmarks/context_parallel.py $(ARGS)

bench-end-to-end: .venv/built .venv/developed
	@$(BIN)/python benchmarks/end_to_end.py $(ARGS)

bench-experts: .venv/built .venv/developed
	@$(BIN)/python benchmarks/experts.py $(ARGS)

bench-layers: .venv/built .venv/developed
	@$(BIN)/python benchmarks/layers.py $(ARGS)

# node.py counts the GPUs, and starts torchrun with a rank for each.
bench-node: .venv/built .venv/developed
	@$(BIN)/python benchmarks/node.py $(ARGS)

bench-models: .venv/built .venv/developed
	@$(BIN)/python benchmarks/fused_models.py $(ARGS)

bench-overlap: .venv/built .venv/developed
	@$(BIN)/python benchmarks/overlap_on_a_slow_link.py $(ARGS)

bench-pipeline: .venv/built .venv/developed
	@$(BIN)/python benchmarks/pipeline_bubble.py $(ARGS)

bench-predicted: .venv/built .venv/developed
	@$(BIN)/python benchmarks/predicted_steps.py $(ARGS)

bench-ring: .venv/built .venv/developed
	@$(BIN)/python benchmarks/context_parallel_on_a_slow_link.py $(ARGS)

bench-save: .venv/built .venv/developed
	@$(BIN)/python benchmarks/background_save.py $(ARGS)

# A link that leads nowhere, and a command of a page that fails, fail the build.
docs: .venv/developed
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)
	@echo "build/site/index.html"

# Root sees all of them: one needs a small disk, one two network namespaces.
faults: .venv/built .venv/developed
	@$(BIN)/python benchmarks/faults/run_all.py $(ARGS)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f fused_megatron/kernels fused_megatron/*.so
	find fused_megatron kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Without build isolation, so that torch is installed once, and the library is compiled against this torch. The install
# compiles no C++: the next stage does, and shows its progress. pip would compile all modules of all packages to bytecode,
# one by one, which takes longer than the install: training's own are compiled by an import, and all on all cores where the
# tools of the tests are installed.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	    { echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@echo "fused-megatron: installing torch and what training needs into .venv (once)"
	@$(PYTHON) -m venv .venv
	@$(PIP) "pip>=21.3" "setuptools>=77" cmake ninja torch
	@FUSED_MEGATRON_COMPILE=off FUSED_MEGATRON_CUDA=off $(PIP) --no-build-isolation -e ".[train]"
	@env -u PYTHONDONTWRITEBYTECODE -u PYTHONPATH $(BIN)/python -W ignore \
	    -c "import fused_megatron.training.train, matplotlib.figure, tokenizers"
	@touch $@

.venv/developed: .venv/installed
	@echo "fused-megatron: installing the tools of the tests into .venv (once)"
	@FUSED_MEGATRON_COMPILE=off FUSED_MEGATRON_CUDA=off $(PIP) --no-build-isolation -e ".[dev]"
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	@touch $@

# setup.py says what it compiles, and how far it is.
.venv/built: .venv/installed .venv/cuda-choice setup.py CMakeLists.txt $(shell find csrc -type f)
	@requirements=$$($(BIN)/python -c "import setup; print(*setup.build_requirements())") && \
	    { [ -z "$$requirements" ] || $(PIP) $$requirements; }
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# Rewritten only if the choice differs from the last build.
.venv/cuda-choice: FORCE | .venv/installed
	@echo $(FUSED_MEGATRON_CUDA) | cmp -s - $@ || echo $(FUSED_MEGATRON_CUDA) > $@
