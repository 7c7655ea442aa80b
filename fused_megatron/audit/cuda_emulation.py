"""The CUDA kernels, torch side included, built for the host: one library whose ops serve CPU tensors.

Every csrc/*/*_cuda.cu is compiled by GCC against csrc/emulation/cuda.h. Tests then run on a machine without a GPU as
they would on one (FUSED_MEGATRON_LIBRARY chooses the library), under AddressSanitizer's allocator: each access of a
kernel is checked against what is allocated. For a source checkout; the wheel does not hold csrc.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulation"

_FLAGS = (
    "-std=c++20", "-O1", "-g1", "-fPIC", "-DFM_EMULATION", "-DTORCH_TARGET_VERSION=0x020D000000000000",
    "-Wno-unknown-pragmas", "-Wno-attributes",
)  # fmt: skip
# A call before each access of memory, which csrc/emulation/machine.cpp answers. Aggregates stay whole, so that a load
# of 16 bytes is one access.
_CHECKED_FLAGS = (
    "-fsanitize=kernel-address", "-fno-tree-sra", "--param=asan-instrumentation-with-call-threshold=0",
    "--param=asan-stack=0", "--param=asan-globals=0",
)  # fmt: skip


@functools.cache
def host_compiler() -> str | None:
    """GCC for Linux, which alone is known to instrument kernels as they need it; None where there is none."""
    for command in (os.environ.get("CXX"), "g++", "c++"):
        if command and sys.platform == "linux" and shutil.which(command):
            macros = subprocess.run([command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True)
            if "__GNUC__" in macros.stdout and "__clang__" not in macros.stdout:
                return command
    return None


def cuda_sources() -> list[Path]:
    """The files of the ops that have CUDA kernels."""
    return sorted(CSRC.glob("*/*_cuda.cu"))


def build_emulation(sources: Iterable[Path] | None = None, cache: Path = CACHE) -> Path:
    """The library with the kernels of `sources` (default: of all ops), compiled as far as it has changed."""
    compiler = host_compiler()
    assert compiler is not None, "the emulation needs GCC on Linux"
    files = [CSRC / "emulation" / "machine.cpp", *(cuda_sources() if sources is None else sources)]
    headers = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh"))
    common = hashlib.sha256(_version(compiler).encode() + torch.__version__.encode())
    common.update(" ".join(_FLAGS + _CHECKED_FLAGS).encode())
    for header in headers:
        common.update(header.read_bytes())
    cache.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda file: _compiled(compiler, file, common.copy(), cache), files))
    names = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:16]
    torch_folder = Path(torch.__file__).parent / "lib"
    linked = cache / f"emulation-{names}.so"
    link = [*map(str, objects), "-shared", f"-L{torch_folder}", "-ltorch_cpu", "-ldl"]
    _make(linked, [compiler, *link])
    return linked


def sanitizer_libraries() -> list[Path]:
    """AddressSanitizer's runtime, which has to be loaded before anything else; empty where it is not installed.

    And libstdc++, whose exceptions it looks for when it starts: Python does not load it that early.
    """
    compiler = host_compiler()
    paths = []
    for name in ("libasan.so", "libstdc++.so") if compiler is not None else ():
        command = [str(compiler), f"-print-file-name={name}"]
        paths.append(Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()).resolve())
    return paths if all(path.exists() for path in paths) else []


def emulated_environment(library: Path) -> dict[str, str]:
    """The environment of a Python process whose CPU tensors are served by emulated CUDA kernels."""
    environment = {**os.environ, "FUSED_MEGATRON_LIBRARY": str(library)}
    sanitizer = sanitizer_libraries()
    if sanitizer:
        environment["LD_PRELOAD"] = " ".join([*map(str, sanitizer), os.environ.get("LD_PRELOAD", "")]).strip()
        # New memory is full of NaN. Python's own allocations outlive everything; they are no leaks.
        options = "detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255:quarantine_size_mb=64"
        environment["ASAN_OPTIONS"] = options
    return environment


@functools.cache
def loaded_emulation() -> ctypes.CDLL | None:
    """The emulated library that this process uses (FUSED_MEGATRON_LIBRARY), for its settings; None for another one."""
    path = os.environ.get("FUSED_MEGATRON_LIBRARY")
    if not path:
        return None
    library = ctypes.CDLL(path)
    if not hasattr(library, "fm_emulation_set_seed"):
        return None
    library.fm_emulation_counted.restype = ctypes.c_char_p
    return library


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _compiled(compiler: str, source: Path, key: "hashlib._Hash", cache: Path) -> Path:
    key.update(source.read_bytes())
    result = cache / f"{source.stem}-{key.hexdigest()[:16]}.o"
    checked = () if source.name == "machine.cpp" else _CHECKED_FLAGS
    include = Path(torch.__file__).parent / "include"
    own = ["-x", "c++", f"-I{CSRC}", "-isystem", str(include), "-c", str(source)]
    _make(result, [compiler, *_FLAGS, *checked, *own])
    return result


def _make(result: Path, command: list[str]) -> None:
    """Run a compiler unless what it makes is there; moved into place whole, so that several may do so at a time."""
    if result.exists():
        return
    part = result.with_suffix(f".{os.getpid()}.part")
    done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
    if done.returncode != 0:
        errors = "\n".join(re.findall(r"^.*(?:error|undefined).*$", done.stderr, re.MULTILINE)[:20])
        raise AssertionError(f"{result.name}: the host compiler fails:\n{errors or done.stderr[-4000:]}")
    part.replace(result)
