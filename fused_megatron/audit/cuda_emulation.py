"""Emulation of the CUDA kernels on the host: a library, built by GCC, whose ops run the kernels on CPU tensors.

GCC compiles every csrc/*/*_cuda.cu, with its torch code, against csrc/emulation/cuda.h. Tests then run without a GPU as
they do on one (FUSED_MEGATRON_LIBRARY selects the library), under AddressSanitizer's allocator: each access of a kernel
is checked against the allocated memory. Needs a source checkout; the wheel does not contain csrc.
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

from fused_megatron.checks import InputError, check

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulation"

_FLAGS = (
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-DFM_EMULATION",
    "-DTORCH_TARGET_VERSION=0x020D000000000000",
    "-Wno-unknown-pragmas",
    "-Wno-attributes",
)
# GCC inserts a call before each memory access, which csrc/emulation/machine.cpp implements. Aggregates are not split:
# a load of 16 bytes is one access.
_CHECKED_FLAGS = (
    "-fsanitize=kernel-address",
    "-fno-tree-sra",
    "--param=asan-instrumentation-with-call-threshold=0",
    "--param=asan-stack=0",
    "--param=asan-globals=0",
)


@functools.cache
def host_compiler() -> str | None:
    """Return the command of GCC on Linux, the only compiler known to instrument as needed; None without one."""
    for command in (os.environ.get("CXX"), "g++", "c++"):
        if command and sys.platform == "linux" and shutil.which(command):
            macros = subprocess.run([command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True)
            if "__GNUC__" in macros.stdout and "__clang__" not in macros.stdout:
                return command
    return None


def cuda_sources() -> list[Path]:
    """Return the source files of the CUDA kernels."""
    return sorted(CSRC.glob("*/*_cuda.cu"))


def build_emulation(sources: Iterable[Path] | None = None, cache: Path = CACHE) -> Path:
    """Build the library with the kernels of `sources` (default: all ops) and return it; unchanged files are reused.

    Raises:
        InputError: there are no sources of the kernels, or no GCC.
    """
    check(CSRC.exists(), "the emulation needs the sources of the kernels: a checkout (git clone), not the wheel")
    compiler = host_compiler()
    if compiler is None:
        raise InputError("the emulation needs GCC on Linux: apt-get install g++")
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
    """Return the runtime of AddressSanitizer, which must be loaded first, and libstdc++; empty if not installed.

    The runtime looks for the exceptions of libstdc++ when it starts; Python does not load libstdc++ that early.
    """
    compiler = host_compiler()
    paths = []
    for name in ("libasan.so", "libstdc++.so") if compiler is not None else ():
        command = [str(compiler), f"-print-file-name={name}"]
        paths.append(Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()).resolve())
    return paths if all(path.exists() for path in paths) else []


def emulated_environment(library: Path) -> dict[str, str]:
    """Return the environment of a Python process in which emulated CUDA kernels run on CPU tensors."""
    environment = {**os.environ, "FUSED_MEGATRON_LIBRARY": str(library)}
    sanitizer = sanitizer_libraries()
    if sanitizer:
        environment["LD_PRELOAD"] = " ".join([*map(str, sanitizer), os.environ.get("LD_PRELOAD", "")]).strip()
        # Fill new memory with NaN. No leak detection: Python keeps allocations until the process ends.
        options = "detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255:quarantine_size_mb=64"
        environment["ASAN_OPTIONS"] = options
    return environment


@functools.cache
def loaded_emulation() -> ctypes.CDLL | None:
    """Return the emulated library that this process uses, for its settings; None if it uses another library."""
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
    """Run a compiler unless its result exists; the result is moved into place, so that processes may run at once."""
    if result.exists():
        return
    part = result.with_suffix(f".{os.getpid()}.part")
    done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
    if done.returncode != 0:
        errors = "\n".join(re.findall(r"^.*(?:error|undefined).*$", done.stderr, re.MULTILINE)[:20])
        raise AssertionError(f"{result.name}: the host compiler fails:\n{errors or done.stderr[-4000:]}")
    part.replace(result)


if __name__ == "__main__":  # `make test` runs this first; the first build takes a minute
    try:
        build_emulation()
    except InputError as error:
        print(f"fused-megatron: {error}", file=sys.stderr)
