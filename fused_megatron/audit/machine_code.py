"""Machine code of the CUDA kernels: registers, spills, shared memory and access widths after nvcc.

The code comes from the compiled library if that is newer than the sources and contains CUDA code. Otherwise nvcc
compiles it to build/audit, and again whenever a source or the compiler changes.
"""

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from fused_megatron import extension
from fused_megatron.audit.cuda_emulation import CSRC, ROOT, cuda_sources
from fused_megatron.audit.instruction_path import InstructionPath, listing, main_paths
from fused_megatron.audit.occupancy import LIMITS
from fused_megatron.optional_packages import install_command

CACHE = ROOT / "build" / "audit"


@dataclass(frozen=True)
class Code:
    """Resources of one compiled kernel.

    Attributes:
        load_widths, store_widths: instructions that access global memory, by their width in bits.
        paths: instructions on the ways through the main loop (instruction_path.main_paths).
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    load_widths: dict[int, int]
    store_widths: dict[int, int]
    paths: tuple[InstructionPath, ...] = ()


@functools.cache
def tool(name: str) -> str | None:
    """Return the path of cuobjdump, nvdisasm or ptxas in Triton's wheel, PyPI's nvidia packages or PATH, or None."""
    folders = []
    for package, inside in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            folders.append(str(Path(folder) / inside))
    return shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


@functools.cache
def nvcc_version() -> str | None:
    """Return the version of nvcc, for example "13.0.88"; None without nvcc."""
    if shutil.which("nvcc") is None:
        return None
    output = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", output)
    return found.group(1) if found else None


def missing() -> list[str]:
    """Return a line for each missing tool: what it is for, and how to install it."""
    lacks = []
    if nvcc_version() is None:
        lacks.append("nvcc, for registers, spills and machine code of the CUDA kernels: install a CUDA 13 toolkit")
    if tool("cuobjdump") is None:
        lacks.append(f"cuobjdump, for the same: {install_command('triton')} (contains it) or nvidia-cuda-cuobjdump")
    return lacks


@functools.cache
def library() -> Path | None:
    """Return the compiled library if it contains the machine code of these sources, else None."""
    path = extension.LIBRARY
    if not path.exists() or path.stat().st_mtime < max(file.stat().st_mtime for file in CSRC.rglob("*.cu*")):
        return None
    listed = subprocess.run([str(tool("cuobjdump")), "-lelf", str(path)], capture_output=True, text=True).stdout
    return path if all(arch in listed for arch in LIMITS) else None


@functools.cache
def compiled(op: str, arch: str) -> Path:
    """Compile csrc/<op>/<op>_cuda.cu for an architecture, for example "sm_90a"; return the file."""
    source = CSRC / op / f"{op}_cuda.cu"
    key = hashlib.sha256(f"{nvcc_version()} {torch.__version__} {arch}".encode())
    others = {file.parent for file in cuda_sources()} - {source.parent}
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh") and p.parent not in others):
        key.update(path.read_bytes())
    key.update(source.read_bytes())
    result = CACHE / f"{op}-{arch}-{key.hexdigest()[:16]}.cubin"
    if not result.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = result.with_suffix(f".{os.getpid()}.part")
        include = Path(torch.__file__).parent / "include"
        command = [
            "nvcc",
            "-std=c++20",
            "-O3",
            f"-arch={arch}",
            "-DTORCH_TARGET_VERSION=0x020D000000000000",
            f"-I{CSRC}",
            "-isystem",
            str(include),
            "-cubin",
            str(source),
            "-o",
            str(part),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"nvcc fails on {source.name}:\n{done.stderr[-4000:]}"
        part.replace(result)
    return result


@functools.cache
def code_of(op: str, arch: str, symbol: str) -> Code:
    """Return the resources of one kernel of an op, by its symbol."""
    binary = library() or compiled(op, arch)
    return read_code(binary, symbol, resources_of(binary, arch)[symbol], arch)


def read_code(binary: Path, symbol: str, resources: dict[str, int], arch: str) -> Code:
    """Combine the access widths in the disassembly with the entry of the resource table."""
    sass = _disassembled(binary, arch)[symbol]
    # LDGSTS loads from global memory to shared memory.
    loads = _widths(sass, "LDG(?:STS)?")
    stores = _widths(sass, "STG")
    local = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    # Spilled registers are in the stack frame; our kernels use the stack for nothing else.
    spilled = max(resources["STACK"], resources["LOCAL"], 4 * local)
    paths = tuple(main_paths(listing(binary, arch, symbol, str(tool("cuobjdump")))))
    return Code(resources["REG"], spilled, resources["SHARED"], loads, stores, paths)


@functools.cache
def _disassembled(binary: Path, arch: str) -> dict[str, str]:
    """Return the memory instructions by function; the full listing of a library takes a gigabyte."""
    command = [str(tool("cuobjdump")), "-sass", "-arch", arch, str(binary)]
    functions: dict[str, list[str]] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listing:
        assert listing.stdout is not None
        lines: list[str] = []
        for line in listing.stdout:
            if "Function :" in line:
                name = line.split()[-1]
                # A kernel that several files use, such as finish_column_sums, is listed once per file: keep the first.
                lines = []
                functions.setdefault(name, lines)
            elif "LDG" in line or "STG" in line or "LDL" in line or "STL" in line:
                lines.append(line)
    return {name: "".join(found) for name, found in functions.items()}


def _widths(sass: str, instruction: str) -> dict[int, int]:
    """Count instructions by width in bits: LDG.E.128.CONSTANT is 128, LDG.E.U16 16, LDG.E 32."""
    counts: Counter[int] = Counter()
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", sass):
        found = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
        counts[int(found.group(1)) if found else 32] += 1
    return dict(sorted(counts.items(), reverse=True))


@functools.cache
def resources_of(binary: Path, arch: str) -> dict[str, dict[str, int]]:
    """Return the resources of every kernel of a file, by symbol."""
    command = [str(tool("cuobjdump")), "-res-usage", "-arch", arch, str(binary)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parsed_resources(output)


def parsed_resources(output: str) -> dict[str, dict[str, int]]:
    """Parse the lines "REG:44 STACK:0 .." of cuobjdump; return the numbers by function."""
    functions = re.findall(r"Function (\S+):\s*\n\s*(.*)", output)
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", values)} for name, values in functions}
