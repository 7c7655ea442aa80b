"""Description of a benchmark run: machine, date, versions and settings."""

import datetime
import importlib.metadata
import os
import platform

import torch

from fused_megatron.benchmarking.report.results_file import Results
from fused_megatron.benchmarking.timing_devices import TimingDevice

# Packages whose versions affect the figures, listed if they are installed.
_PACKAGES = (
    "fused-megatron",
    "triton",
    "liger-kernel",
    "apex",
    "transformer-engine",
    "quack-kernels",
    "megatron-core",
    "transformers",
)


def describe_run(theme: str, device: TimingDevice, *, num_gpus: int = 1, **settings: str) -> Results:
    """Return Results without comparisons, with the machine, date, versions and settings filled in.

    Args:
        theme: "ops", "layers", "end_to_end", "node".
        device: that is timed. The name of a CPU should be its processor's: CpuDevice(processor_name()).
        num_gpus: number of GPUs that the largest comparison uses.
        settings: further settings, which also replace the ones found here: threads="2 ranks of 1", malloc="..".
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
