# Everything runs in .venv, which the first target makes and later ones reuse.
#   PYTHON=python3.12           another Python (3.10 or newer)
#   FUSED_MEGATRON_CUDA=on|off  must the CUDA kernels be built? (auto: when nvcc is found; see setup.py)
#   ARGS="..."                  further arguments for train, test and bench
PYTHON ?= python3
FUSED_MEGATRON_CUDA ?= auto
CONFIG ?= examples/gpt_tiny.toml
RANKS ?= 2
export FUSED_MEGATRON_CUDA

BIN := .venv/bin
BEGUN := $(shell date +%s)
# No network but for packages, no question asked, nothing said unless it fails.
PIP := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train test mutants lint types bench bench-end-to-end bench-gpu bench-layers bench-node bench-overlap bench-pipeline faults clean FORCE

help:
	@echo "make train   train a small GPT on 2 ranks ($(CONFIG))"
	@echo "make test    run the tests (ARGS='-m slow' runs the slow ones)"
	@echo "make mutants plant the mistakes of tests/mutations, one at a time, and see that a test fails"
	@echo "make lint    ruff: faults and format        make types   mypy"
	@echo "make bench   compare speeds on the CPU      make bench-gpu   and on a GPU"
	@echo "make bench-end-to-end   training steps in every layout beside torch's own means, megatron-core, Hugging Face"
	@echo "make bench-layers    tensor-parallel layers beside DTensor's"
	@echo "make bench-node      weak scaling of the papers' GPTs on all GPUs of this machine"
	@echo "make bench-overlap   what overlap hides on a slow link (root)"
	@echo "make bench-pipeline  bubbles, measured"
	@echo "make faults  inject faults into checkpoints, datasets and ranks, of ours and of others (docs/reliability.md)"
	@echo "make setup   only install and build"
	@echo "make clean   remove .venv and all that was built (runs/ stays)"

setup: .venv/built

train: .venv/built
	@exec $(BIN)/python -m fused_megatron launch --nproc-per-node $(RANKS) train $(CONFIG) $(ARGS)

# Whole files to each of a few workers: tests start ranks of their own, and share what a file sets up. In the order of
# the folders: tests/audit, whose few tests are the longest, begins. Set-up (what is built once) is reported apart.
test: .venv/built
	@$(BIN)/python -m fused_megatron.audit.cuda_emulation
	@echo "fused-megatron: set-up took $$(( $$(date +%s) - $(BEGUN) )) s; tests:"
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	    --durations 10 --durations-min 1 $(ARGS)

# Mistakes planted in a copy of the tree, one at a time: the tests must see each (tests/mutations).
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

bench-end-to-end: .venv/built
	@$(BIN)/python benchmarks/end_to_end.py $(ARGS)

bench-layers: .venv/built
	@$(BIN)/python benchmarks/layers.py $(ARGS)

# It counts the GPUs, and starts torchrun with a rank for each.
bench-node: .venv/built
	@$(BIN)/python benchmarks/node.py $(ARGS)

bench-overlap: .venv/built
	@$(BIN)/python benchmarks/overlap_on_a_slow_link.py $(ARGS)

bench-pipeline: .venv/built
	@$(BIN)/python benchmarks/pipeline_bubble.py $(ARGS)

# Root sees all of them: one needs a small disk, one two network namespaces.
faults: .venv/built
	@$(BIN)/python benchmarks/faults/run_all.py $(ARGS)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f fused_megatron/kernels fused_megatron/*.so
	find fused_megatron kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Without build isolation, so that torch is installed once, and is the torch that the library is compiled against.
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

# Rewritten only when the choice is another than at the last build.
.venv/cuda-choice: FORCE | .venv/installed
	@echo $(FUSED_MEGATRON_CUDA) | cmp -s - $@ || echo $(FUSED_MEGATRON_CUDA) > $@
