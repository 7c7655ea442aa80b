# Commands of the project. Everything runs in .venv, which the first target makes and later targets reuse.
#   PYTHON=python3.12           another Python (3.10 or newer)
#   FUSED_MEGATRON_CUDA=on|off  require or skip the CUDA kernels (auto: build them if nvcc is found; see setup.py)
#   ARGS="..."                  further arguments for train, test and bench
PYTHON ?= python3
FUSED_MEGATRON_CUDA ?= auto
CONFIG ?= examples/gpt_tiny.toml
RANKS ?= 2
export FUSED_MEGATRON_CUDA

BIN := .venv/bin
BEGUN := $(shell date +%s)
# pip uses the network only for packages, asks nothing, and prints nothing unless it fails.
PIP := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train test mutants lint types bench bench-context-parallel bench-end-to-end bench-experts bench-gpu bench-layers bench-models bench-node bench-overlap bench-pipeline bench-predicted bench-ring bench-save faults clean FORCE

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
	@echo "make setup   only install and build"
	@echo "make clean   remove .venv and everything built (runs/ stays)"

setup: .venv/built

train: .venv/built
	@exec $(BIN)/python -m fused_megatron launch --nproc-per-node $(RANKS) train $(CONFIG) $(ARGS)

# Each worker gets whole files: tests start ranks of their own, and the tests of a file share its set-up. Files run in
# the order of the folders, so that tests/audit, with the longest tests, comes first. The time of one-off builds is
# reported separately. Compiled modules are kept even where PYTHONDONTWRITEBYTECODE is set: the tests start about a hundred
# processes that import the package, which would each compile it again.
test: .venv/built
	@$(BIN)/python -m fused_megatron.audit.cuda_emulation
	@echo "fused-megatron: set-up took $$(( $$(date +%s) - $(BEGUN) )) s; tests:"
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	    --durations 10 --durations-min 1 $(ARGS)

# Plants mistakes in a copy of the tree, one at a time; the tests must find each (tests/mutations).
mutants: .venv/built
	@$(BIN)/python tests/mutations/run.py $(ARGS)

lint: .venv/installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: .venv/installed
	@$(BIN)/mypy

bench: .venv/built
	@$(BIN)/python benchmarks/run_all.py $(ARGS)

bench-gpu: .venv/built
	@$(BIN)/python benchmarks/run_all.py --gpu $(ARGS)

bench-context-parallel: .venv/built
	@$(BIN)/python benchmarks/context_parallel.py $(ARGS)

bench-end-to-end: .venv/built
	@$(BIN)/python benchmarks/end_to_end.py $(ARGS)

bench-experts: .venv/built
	@$(BIN)/python benchmarks/experts.py $(ARGS)

bench-layers: .venv/built
	@$(BIN)/python benchmarks/layers.py $(ARGS)

# node.py counts the GPUs, and starts torchrun with a rank for each.
bench-node: .venv/built
	@$(BIN)/python benchmarks/node.py $(ARGS)

bench-models: .venv/built
	@$(BIN)/python benchmarks/fused_models.py $(ARGS)

bench-overlap: .venv/built
	@$(BIN)/python benchmarks/overlap_on_a_slow_link.py $(ARGS)

bench-pipeline: .venv/built
	@$(BIN)/python benchmarks/pipeline_bubble.py $(ARGS)

bench-predicted: .venv/built
	@$(BIN)/python benchmarks/predicted_steps.py $(ARGS)

bench-ring: .venv/built
	@$(BIN)/python benchmarks/context_parallel_on_a_slow_link.py $(ARGS)

bench-save: .venv/built
	@$(BIN)/python benchmarks/background_save.py $(ARGS)

# Root sees all of them: one needs a small disk, one two network namespaces.
faults: .venv/built
	@$(BIN)/python benchmarks/faults/run_all.py $(ARGS)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f fused_megatron/kernels fused_megatron/*.so
	find fused_megatron kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Without build isolation, so that torch is installed once, and the library is compiled against this torch.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	    { echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@echo "fused-megatron: installing into .venv (once; takes minutes)"
	@$(PYTHON) -m venv .venv
	@$(PIP) "pip>=21.3" "setuptools>=77" cmake ninja pybind11 torch
	@$(PIP) --no-build-isolation -e ".[dev]"
	@touch $@

.venv/built: .venv/installed .venv/cuda-choice setup.py CMakeLists.txt $(shell find csrc -type f)
	@requirements=$$($(BIN)/python -c "import setup; print(*setup.nvcc_requirements())") && \
	    { [ -z "$$requirements" ] || $(PIP) $$requirements; }
	@echo "fused-megatron: building"
	@$(BIN)/python setup.py --quiet build_ext --inplace > .venv/build.log 2>&1 || { cat .venv/build.log; exit 1; }
	@grep "^fused-megatron:" .venv/build.log || true
	@touch $@

# Rewritten only if the choice differs from the last build.
.venv/cuda-choice: FORCE | .venv/installed
	@echo $(FUSED_MEGATRON_CUDA) | cmp -s - $@ || echo $(FUSED_MEGATRON_CUDA) > $@
