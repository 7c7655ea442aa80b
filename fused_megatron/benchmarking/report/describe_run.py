"""What the figures of a run hang on: the machine, the day, versions and settings."""

import datetime
import importlib.metadata
import os
import platform

import torch

from fused_megatron.benchmarking.report.results_file import Results
from fused_megatron.benchmarking.timing_devices import TimingDevice

# Distributions whose code is timed beside ours, or makes ours: named where they are installed.
_PACKAGES = (
    "fused-megatron", "triton", "liger-kernel", "apex", "transformer-engine", "quack-kernels", "megatron-core",
    "transformers",
)  # fmt: skip


def describe_run(theme: str, device: TimingDevice, *, num_gpus: int = 1, **settings: str) -> Results:
    """Results without comparisons yet, that say where, when and how they were measured.

    Args:
        theme: "ops", "layers", "end_to_end", "node".
        device: what is timed on. Of a CPU its name should be the processor's: CpuDevice(processor_name()).
        num_gpus: of them, as many as the largest comparison uses.
        settings: further ones, and others in place of those found here: threads="2 ranks of 1", malloc="..".
    """
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.is_gpu:
        hardware = device.name if num_gpus == 1 else f"{num_gpus} x {device.name}"
        found["cuda"] = str(torch.version.cuda)
    else:
        hardware = f"{device.name}, {os.cpu_count()} cores"
        found["threads"] = str(torch.get_num_threads())
    return Results(theme, hardware, datetime.date.today().isoformat(), found | settings)
