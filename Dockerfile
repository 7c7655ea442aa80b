# The image of fused-megatron, for the file that `fused-megatron launch kubernetes` prints.
#   docker build -t fused-megatron .                           GPUs: CUDA kernels for sm_80, sm_90a and sm_100a, PTX for later
#   docker build -t fused-megatron --build-arg DEVICE=cpu .    CPUs only
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG DEVICE=gpu
# An index with CPU builds of torch makes the image for CPUs 5 GB smaller; by default pip's own index.
ARG TORCH_INDEX=
RUN apt-get update && apt-get install -y --no-install-recommends g++
WORKDIR /source
COPY . .
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# torch first: the kernels are compiled against it. For GPUs setup.py takes nvcc from pip's index.
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.13"
RUN FUSED_MEGATRON_CUDA=$(test "$DEVICE" = gpu && echo on || echo off) pip install --no-cache-dir -c constraints.txt ".[train]"

FROM python:${PYTHON}-slim
ARG DEVICE=gpu
# Triton compiles its launchers with a C compiler when a kernel runs for the first time.
RUN if test "$DEVICE" = gpu; then apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; fi
RUN useradd --create-home --uid 1000 trainer && mkdir /shared && chown trainer /shared
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
RUN fused-megatron --version
USER trainer
# The shared volume is mounted here: relative paths of a config, and its run folder, are on the volume.
WORKDIR /shared
CMD ["fused-megatron", "--help"]
