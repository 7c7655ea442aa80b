"""Facts about the machine: processor, memory, GPUs, links between GPUs, compilers."""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from fused_megatron.doctor.buses import find_buses
from fused_megatron.doctor.facts import Gpu, Machine, Tools
from fused_megatron.observe.free_memory import memory_bytes
from fused_megatron.observe.processor import processor_name_and_flags

_FLAGS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX", "sve": "SVE"}
_PATIENCE_S = 2.0


class Question:
    """A program that runs while torch is imported; its output is read afterwards."""

    def __init__(self, *command: str, stdin: str = "") -> None:
        self._process: subprocess.Popen[str] | None = None
        try:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
            self._process.stdin.write(stdin)  # type: ignore[union-attr]
            self._process.stdin.close()  # type: ignore[union-attr]
            self._process.stdin = None
        except OSError:  # the program does not exist, or does not read its input
            pass

    @functools.cached_property
    def answer(self) -> str | None:
        """The output of the program; None if it does not exist, fails or takes too long."""
        if self._process is None:
            return None
        try:
            output, _ = self._process.communicate(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return None
        return output if self._process.returncode == 0 else None


class Questions:
    """All programs that the doctor runs, started at once."""

    def __init__(self) -> None:
        chosen = os.environ.get("CXX", "").split() or [next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")]
        # Run the compiler, as setup.py does: macOS has a c++ that only offers to install a compiler.
        self.cxx20 = Question(*chosen, "-std=c++20", "-fsyntax-only", "-x", "c++", "-", stdin="#include <span>\n")
        self.cxx = Question(*chosen, "--version")
        self.nvcc_path = _nvcc()
        self.nvcc = Question(self.nvcc_path or "nvcc", "--version")
        columns = "--query-gpu=name,compute_cap,memory.total,driver_version"
        self.gpus = Question("nvidia-smi", columns, "--format=csv,noheader,nounits")
        self.links = Question("nvidia-smi", "topo", "-m")
        self.addresses = Question("nvidia-smi", "--query-gpu=pci.bus_id", "--format=csv,noheader")
        self.driver = Question("nvidia-smi")


def _nvcc() -> str | None:
    """Return nvcc's path; it looks where setup.py does: CUDACXX, PATH, the toolkit's folder, packages from PyPI."""
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders = [toolkit, *(os.path.join(folder, "nvidia", "cu13") for folder in sys.path)]
    path = os.pathsep.join(os.path.join(folder, "bin") for folder in folders)
    return shutil.which(os.environ.get("CUDACXX") or "nvcc") or shutil.which("nvcc", path=path)


def find_tools(questions: Questions) -> Tools:
    """Find the compilers that the build and Triton would use."""
    version = questions.cxx.answer
    release = re.search(r"release ([\d.]+)", questions.nvcc.answer or "")
    return Tools(
        cxx=version.splitlines()[0] if version and questions.cxx20.answer is not None else None,
        cc=next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")))), None),
        nvcc=questions.nvcc_path,
        nvcc_release=release[1] if release else None,
    )


def find_machine(questions: Questions) -> Machine:
    """Gather what the system and the driver report."""
    model, flags = processor_name_and_flags()
    total, available = memory_bytes()
    gpus, driver = parse_gpus(questions.gpus.answer or "")
    return Machine(
        cpu=model,
        vector_units=tuple(name for flag, name in _FLAGS.items() if flag in flags),
        cores=os.cpu_count() or 1,
        usable_cores=_usable_cores(),
        memory_gb=total / 1e9,
        available_gb=available / 1e9,
        shared_memory_gb=shutil.disk_usage("/dev/shm").total / 1e9 if os.path.isdir("/dev/shm") else None,
        gpus=gpus,
        driver=driver,
        links=parse_links(questions.links.answer or ""),
        driver_cuda=parse_driver_cuda(questions.driver.answer or ""),
        buses=find_buses((questions.addresses.answer or "").split()),
    )


def parse_gpus(output: str) -> tuple[tuple[Gpu, ...], str | None]:
    """Parse nvidia-smi's lines "name, capability, MiB, driver" into the GPUs and the driver's version."""
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines()]
    rows = [row for row in rows if len(row) == 4 and re.fullmatch(r"\d+\.\d+", row[1])]
    memory = [float(row[2]) * 2**20 / 1e9 if row[2].isdigit() else 0.0 for row in rows]
    gpus = tuple(Gpu(row[0], row[1], size) for row, size in zip(rows, memory, strict=True))
    return gpus, rows[0][3] if rows else None


def parse_driver_cuda(output: str) -> str | None:
    """Return the newest CUDA of the driver, such as "13.0", from what nvidia-smi prints; None if it does not say."""
    found = re.search(r"CUDA (?:UMD )?Version: *(\d+\.\d+)", output)
    return found[1] if found else None


def parse_links(output: str) -> dict[str, int]:
    """Count the pairs of GPUs by kind of link in the matrix of `nvidia-smi topo -m`."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", output)
    rows = [line.split() for line in plain.splitlines() if re.match(r"GPU\d+\s", line)]
    pairs = Counter(kind for i, row in enumerate(rows) for kind in row[2 + i : 1 + len(rows)])
    return dict(pairs)


def _usable_cores() -> float:
    """Return the cores that this process may use by its affinity and its container's quota."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        return min(cores, int(quota[0]) / int(quota[1]))
    older = [_read(f"/sys/fs/cgroup/cpu/cpu.cfs_{part}_us").strip() for part in ("quota", "period")]
    if all(part.isdigit() and int(part) > 0 for part in older):
        return min(cores, int(older[0]) / int(older[1]))
    return cores


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
