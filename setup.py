"""Build script: it compiles with CMake + Ninja and maps kernels/ to fused_megatron.kernels.

pyproject.toml has the static settings. Two environment variables choose what is compiled:

    FUSED_MEGATRON_CUDA=auto|on|off     auto: build the CUDA kernels too if there are a GPU and an nvcc that works.
                                        on: require them; if there is no nvcc, install it from PyPI.
    FUSED_MEGATRON_COMPILE=auto|on|off  auto: compile nothing if there is no C++20 compiler; all ops then run on their
                                        reference. on: no compiler is an error. off: compile nothing.

The headers of an installed torch are used, also in pip's isolated environment: only if there is none, pip installs one
to build with. Lines that say what is done go to stderr, and to the terminal, from which pip keeps the output of builds.
"""

import contextlib
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel
from setuptools.command.egg_info import egg_info
from setuptools.errors import SetupError

ROOT = Path(__file__).parent.resolve()

# torch's stable ABI, against which the library is compiled, is complete from this version on.
OLDEST_TORCH = (2, 13)
TORCH_REQUIREMENT = "torch==2.13.0"
# The compiler driver needs crt, nvvm and the runtime's headers; cccl has <nv/target>, which cuda_fp16.h needs. torch
# 2.13 is built with toolkit 13.0: our machine code runs on every driver on which torch's code runs. A driver reads no
# PTX that is newer than the driver.
CUDA_REQUIREMENTS = [
    f"{name}==13.0.*"
    for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
]
PROGRESS_S = 10.0


class CMakeBuild(build_ext):
    """One CMake build for the torch library and the dataset index."""

    def run(self) -> None:
        cuda = choice("FUSED_MEGATRON_CUDA")
        compiler, reason = find_compiler()
        if compiler is None:
            if cuda == "on":
                raise SetupError("FUSED_MEGATRON_CUDA=on needs a C++20 compiler: install one or set CXX")
            if choice("FUSED_MEGATRON_COMPILE") != "off":
                say(f"no C++20 compiler ({reason}); no kernels are compiled: all ops run on their slower reference")
            self.extensions = []
            return
        nvcc = None if cuda == "off" else find_nvcc()
        if cuda == "on" and nvcc is None:
            raise SetupError(
                "FUSED_MEGATRON_CUDA=on but no nvcc was found: put it on PATH, set CUDACXX, or take it from PyPI: "
                f"pip install {shlex.join(CUDA_REQUIREMENTS)}"
            )
        if nvcc and cuda == "auto" and not has_gpu():
            say("nvcc is here, but no GPU: only CPU kernels are compiled (FUSED_MEGATRON_CUDA=on compiles both)")
            nvcc = None
        try:
            self.compile(compiler, nvcc)
        except subprocess.CalledProcessError as error:
            if nvcc is None or cuda == "on":
                raise SetupError(
                    "compiling fused-megatron failed (see above); to install without compiled kernels set "
                    "FUSED_MEGATRON_COMPILE=off" + ("; without the CUDA ones, FUSED_MEGATRON_CUDA=off" if nvcc else "")
                ) from error
            say(f"the build with {nvcc} failed (see above); building only for the CPU")
            self.compile(compiler, None)

    def compile(self, compiler: list[str], nvcc: str | None) -> None:
        """Configure, build, and copy the libraries into the package (in place) or into its build folder."""
        folder = ROOT / "build" / ("cmake-cuda" if nvcc else "cmake-cpu")
        cmake, ninja, torch = find_program("cmake"), find_program("ninja"), find_torch()
        if torch is None:
            raise SetupError(
                "torch >= 2.13 is needed to compile fused-megatron: pip install torch, a CPU or a CUDA build, first"
            )
        configuration = [
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_CXX_COMPILER={';'.join(compiler)}",
            *([f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DFUSED_MEGATRON_CUDA=ON"] if nvcc else []),
            f"-DTORCH_FOLDER={torch}",
        ]
        # CMake's cache holds the paths of an earlier compiler or (isolated) environment, which may be gone.
        record, key = folder / "configuration.txt", "\n".join([cmake, *configuration])
        if folder.exists() and (not record.exists() or record.read_text() != key):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(key)
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "fused_megatron"
        environment = {**os.environ, "LIBRARY_PATH": os.pathsep.join(library_folders(nvcc))}
        announce(compiler, nvcc, torch)
        with open(folder / "build.log", "w+", encoding="utf-8") as log:
            for step in (
                ["-S", str(ROOT), "-B", str(folder), *configuration],
                ["--build", str(folder)],
                ["--install", str(folder), "--prefix", str(package)],
            ):
                run_logged([cmake, *step], environment, log)
        say(f"the compiled libraries are in {package}")


class FreshBuild(build):
    """Removes Python files of an earlier build: setuptools would put deleted files into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class PlatformWheel(bdist_wheel):
    """A wheel for every Python: the compiled libraries use neither Python's API nor its headers."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        holds_none = self.bdist_dir is not None and not any(Path(self.bdist_dir).rglob("*.so"))
        return "py3", "none", "any" if holds_none else platform


class EggInfo(egg_info):
    """Keeps the metadata of a build out of the source folder."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.egg_base = str(ROOT / "build")
        Path(self.egg_base).mkdir(exist_ok=True)


class EditableWheel(editable_wheel):
    """Links fused_megatron/kernels to ../kernels, so that an editable install sees the same tree as a wheel."""

    def run(self) -> None:
        link = ROOT / "fused_megatron" / "kernels"
        if not link.is_symlink():
            link.symlink_to(Path("..") / "kernels", target_is_directory=True)
        super().run()


def choice(variable: str) -> str:
    """Return the value of an auto|on|off environment variable."""
    value = os.environ.get(variable, "").lower() or "auto"
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"error: {variable}={value} must be one of: auto, on, off")
    return value


def say(message: str) -> None:
    """Print a line to stderr, and to the terminal if stderr is hidden, as pip hides it."""
    line = f"fused-megatron: {message}"
    print(line, file=sys.stderr, flush=True)
    # Only for the foreground job of a terminal: a job in the background would stop.
    with contextlib.suppress(OSError):
        if not sys.stderr.isatty():
            with open("/dev/tty", "w", encoding="utf-8") as terminal:
                if os.tcgetpgrp(terminal.fileno()) == os.getpgrp():
                    terminal.write(f"\r{line}\n")


def announce(compiler: list[str], nvcc: str | None, torch: Path) -> None:
    """Say what will be compiled, with what, and how to leave parts out."""
    cpu, cuda = (len(list((ROOT / "csrc").glob(pattern))) for pattern in ("*/*_cpu.cpp", "*/*_cuda.cu"))
    version = ".".join(map(str, torch_version(torch)))
    say(f"compiling {cpu + 1} C++ files with {shlex.join(compiler)} and the headers of torch {version} in {torch}")
    if nvcc:
        say(f"compiling {cuda} CUDA files for three GPU architectures with {nvcc}: ten minutes or more on two cores")
        say("FUSED_MEGATRON_CUDA=off leaves the CUDA files out")
    say("FUSED_MEGATRON_COMPILE=off installs without compiled kernels, and every op runs on plain PyTorch, slower")


def run_logged(command: list[str], environment: dict[str, str], log: TextIO) -> None:
    """Run a step of the build; its output goes to the log, its progress to the user, and the log too if it fails."""
    started = said = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    for line in process.stdout:
        log.write(line)
        done = re.match(r"\[(\d+)/(\d+)\] Building", line)
        now = time.monotonic()
        if done and now - said > PROGRESS_S:
            say(f"{done[1]} of {done[2]} steps of the build done ({now - started:.0f} s)")
            said = now
    if process.wait():
        log.flush()
        log.seek(0)
        sys.stderr.write(log.read())
        raise subprocess.CalledProcessError(process.returncode, command)


@functools.cache
def find_compiler() -> tuple[list[str] | None, str]:
    """Return the command of a C++20 compiler, or None and the reason."""
    wanted = choice("FUSED_MEGATRON_COMPILE")
    if wanted == "off":
        return None, "FUSED_MEGATRON_COMPILE=off"
    chosen = os.environ.get("CXX")
    candidates = [shlex.split(chosen)] if chosen else [["c++"], ["g++"], ["clang++"]]
    reason = "none of c++, g++, clang++ is on PATH"
    for command in candidates:
        # Compile a file: macOS has a c++ that only offers to install a compiler.
        probe = [*command, "-std=c++20", "-x", "c++", "-c", "-o", os.devnull, "-"]
        try:
            subprocess.run(probe, input="#include <span>\n", text=True, capture_output=True, check=True)
            return [shutil.which(command[0]) or command[0], *command[1:]], ""
        except FileNotFoundError:
            if chosen:
                reason = f"CXX={chosen} was not found"
        except subprocess.CalledProcessError as error:
            reason = f"{shlex.join(command)} does not compile C++20: {error.stderr.strip()}"
    if wanted == "on" or chosen:
        raise SetupError(f"no C++20 compiler: {reason}")
    return None, reason


def has_gpu() -> bool:
    """Return whether this machine has an NVIDIA GPU, as far as its driver says."""
    if Path("/dev/nvidia0").exists():
        return True
    try:  # WSL has no such device
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def find_nvcc() -> str | None:
    """Find nvcc in CUDACXX, on PATH, in the toolkit's folder, or in the PyPI packages of this environment."""
    chosen = os.environ.get("CUDACXX")
    if chosen and shutil.which(chosen) is None:
        raise SetupError(f"CUDACXX={chosen} was not found")
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    packages = [Path(folder) / "nvidia" / "cu13" for folder in sys.path]
    folders = os.pathsep.join(str(Path(folder) / "bin") for folder in [toolkit, *packages])
    return shutil.which(chosen or "nvcc") or shutil.which("nvcc", path=folders)


def library_folders(nvcc: str | None) -> list[str]:
    """Return LIBRARY_PATH for the build: nvcc looks for its runtime in lib64, but the PyPI packages only have lib."""
    own = [str(Path(nvcc).parent.parent / "lib")] if nvcc else []
    return [*own, *filter(None, [os.environ.get("LIBRARY_PATH")])]


def find_program(name: str) -> str:
    """Find cmake or ninja: from the build requirement of this name, which needs no PATH; else on the system."""
    attribute = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}[name]
    path = None
    if importlib.util.find_spec(name) is not None:
        path = shutil.which(name, path=getattr(importlib.import_module(name), attribute))
    path = path or shutil.which(name)
    if path is None:
        raise SetupError(f"{name} is needed to compile fused-megatron: pip install {name}")
    return path


def find_torch() -> Path | None:
    """Return the folder of an installed torch that is new enough, without importing it (which takes seconds).

    pip's isolated environment hides the packages of the environment that it installs into; their folder is known.
    """
    return next((folder for folder in torch_folders() if torch_version(folder) >= OLDEST_TORCH), None)


def torch_folders() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    for scheme in ("purelib", "platlib"):
        yield Path(sysconfig.get_path(scheme)) / "torch"


def torch_version(folder: Path) -> tuple[int, ...]:
    """Return (major, minor) of the torch in a folder; (0, 0) if there is none that can be compiled against."""
    version = folder / "version.py"
    if not version.is_file() or not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        return (0, 0)
    found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", version.read_text(encoding="utf-8"))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def build_requirements() -> list[str]:
    """Return the build requirements besides pyproject.toml: torch and nvcc, if something needs them and lacks them."""
    if find_compiler()[0] is None:
        return []
    torch = [] if find_torch() else [TORCH_REQUIREMENT]
    nvcc = CUDA_REQUIREMENTS if choice("FUSED_MEGATRON_CUDA") == "on" and find_nvcc() is None else []
    return [*torch, *nvcc]


def announced_requirements() -> list[str]:
    """Return the build requirements, and say what pip will download for them before it does."""
    requirements = build_requirements()
    if TORCH_REQUIREMENT in requirements:
        say(f"no torch >= 2.13: pip takes {TORCH_REQUIREMENT} to compile with (or: pip install torch, then this again)")
    if set(CUDA_REQUIREMENTS) <= set(requirements):
        say("no nvcc here: pip takes nvcc 13.0 from PyPI")
    return requirements


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["fused_megatron", "fused_megatron.*"]), "fused_megatron.kernels"],
        package_dir={"fused_megatron.kernels": "kernels"},
        ext_modules=[Extension("fused_megatron._torch_ops", sources=[])],
        # Only for egg_info, by which pip asks: in any other command setuptools itself would try to install it.
        setup_requires=announced_requirements() if "egg_info" in sys.argv else [],
        cmdclass={
            "bdist_wheel": PlatformWheel,
            "build": FreshBuild,
            "build_ext": CMakeBuild,
            "editable_wheel": EditableWheel,
            "egg_info": EggInfo,
        },
    )
