"""CUDA kernels compiled for the host, so that their values are tested on machines without a GPU.

The kernels include csrc/launch.h, which stands on csrc/cuda_emulation.h when FM_EMULATION is defined. For a source
checkout with a C++ compiler; the wheel does not hold csrc.
"""

import ctypes
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"


def host_compiler() -> str | None:
    """The C++ compiler, or None."""
    return next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)


def compile_for_host(source: Path, folder: Path) -> ctypes.CDLL:
    """Compile a C++ file that includes CUDA kernels for the host, and load it.

    The library has, besides what the source declares, set_order_seed(uint32): the order in which blocks and threads
    run. A kernel without a race gives the same bits for every seed.
    """
    compiler = host_compiler()
    assert compiler is not None, "no C++ compiler"
    library = folder / f"{source.stem}.so"
    command = [
        compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-DFM_EMULATION", "-Wno-unknown-pragmas",
        f"-I{CSRC}", str(source), "-o", str(library),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@dataclass(frozen=True)
class KernelResources:
    """What ptxas says of one kernel."""

    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def ptxas_resources(source: Path, arch: str, folder: Path) -> list[KernelResources]:
    """Compile a .cu or .cpp file that includes kernels with nvcc for `arch` (such as "sm_90a"); one entry a kernel."""
    command = [
        "nvcc", "-std=c++20", "-O3", "-x", "cu", f"-arch={arch}", "-Xptxas", "-v", f"-I{CSRC}",
        "-c", str(source), "-o", str(folder / f"{source.stem}.{arch}.o"),
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
