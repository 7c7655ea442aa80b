"""What nvcc and ptxas make of the CUDA kernels."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from fused_megatron.testing.cuda_emulation import CSRC


@dataclass(frozen=True)
class KernelResources:
    """What ptxas says of one kernel."""

    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def ptxas_resources(source: Path, arch: str, folder: Path) -> list[KernelResources]:
    """Compile a .cu file with nvcc for `arch` (such as "sm_90a"); one entry a kernel."""
    command = [
        "nvcc", "-std=c++20", "-O3", "-x", "cu", f"-arch={arch}", "-Xptxas", "-v", f"-I{CSRC}",
        "-isystem", str(Path(torch.__file__).parent / "include"),
        "-DTORCH_TARGET_VERSION=0x020D000000000000", "-c", str(source), "-o", str(folder / f"{source.stem}.{arch}.o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resources = []
    for block in done.stderr.split("Compiling entry function '")[1:]:

        def number(pattern: str, block: str = block) -> int:
            found = re.search(pattern, block)
            return int(found.group(1)) if found else 0

        resources.append(
            KernelResources(
                name=block.partition("'")[0],
                registers=number(r"Used (\d+) registers"),
                spill_bytes=number(r"(\d+) bytes spill stores"),
                stack_bytes=number(r"(\d+) bytes stack frame"),
                shared_bytes=number(r"(\d+) bytes smem"),
            )
        )
    return resources
