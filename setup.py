"""Build script: it compiles with CMake + Ninja and maps kernels/ to fused_megatron.kernels.

pyproject.toml has the static settings. Two environment variables choose what is compiled:

    FUSED_MEGATRON_CUDA=auto|on|off     auto: build the CUDA kernels too if there is an nvcc that works.
                                        on: require them; if there is no nvcc, install it from PyPI.
    FUSED_MEGATRON_COMPILE=auto|on|off  auto: compile nothing if there is no C++20 compiler; all ops then run on their
                                        reference. on: no compiler is an error. off: compile nothing.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel
from setuptools.command.egg_info import egg_info
from setuptools.errors import SetupError

ROOT = Path(__file__).parent.resolve()

# The compiler driver needs crt, nvvm and the runtime's headers; cccl has <nv/target>, which cuda_fp16.h needs. torch
# 2.13 is built with toolkit 13.0: our machine code runs on every driver on which torch's code runs. A driver reads no
# PTX that is newer than the driver.
CUDA_REQUIREMENTS = [
    f"{name}==13.0.*"
    for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
]


class CMakeBuild(build_ext):
    """One CMake build for the torch library and the pybind11 helpers."""

    def run(self) -> None:
        cuda, compiler = choice("FUSED_MEGATRON_CUDA"), find_compiler()
        if compiler is None:
            if cuda == "on":
                raise SetupError("FUSED_MEGATRON_CUDA=on needs a C++20 compiler: install one or set CXX")
            self.extensions = []
            return
        nvcc = None if cuda == "off" else find_nvcc()
        if cuda == "on" and nvcc is None:
            raise SetupError(
                "FUSED_MEGATRON_CUDA=on but no nvcc was found: put it on PATH, set CUDACXX, or take it from PyPI: "
                f"pip install {shlex.join(CUDA_REQUIREMENTS)}"
            )
        try:
            self.compile(compiler, nvcc)
        except subprocess.CalledProcessError as error:
            if nvcc is None or cuda == "on":
                raise SetupError(
                    "compiling fused-megatron failed (see above); to install without compiled kernels set "
                    "FUSED_MEGATRON_COMPILE=off" + ("; without the CUDA ones, FUSED_MEGATRON_CUDA=off" if nvcc else "")
                ) from error
            warn(f"the build with {nvcc} failed (see above); building only for the CPU")
            self.compile(compiler, None)

    def compile(self, compiler: list[str], nvcc: str | None) -> None:
        """Configure, build, and copy the libraries into the package (in place) or into its build folder."""
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{'-cuda' if nvcc else ''}"
        cmake, ninja = find_program("cmake"), find_program("ninja")
        configuration = [
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_CXX_COMPILER={';'.join(compiler)}",
            *([f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DFUSED_MEGATRON_CUDA=ON"] if nvcc else []),
            f"-DPython_EXECUTABLE={os.path.abspath(sys.executable)}",
            f"-DTORCH_FOLDER={module_folder('torch')}",
            f"-Dpybind11_DIR={module_folder('pybind11') / 'share' / 'cmake' / 'pybind11'}",
        ]
        # CMake's cache holds the paths of an earlier compiler or (isolated) environment, which may be gone.
        record, key = folder / "configuration.txt", "\n".join([cmake, *configuration])
        if folder.exists() and (not record.exists() or record.read_text() != key):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(key)
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "fused_megatron"
        environment = {**os.environ, "LIBRARY_PATH": os.pathsep.join(library_folders(nvcc))}
        for step in (
            ["-S", str(ROOT), "-B", str(folder), *configuration],
            ["--build", str(folder)],
            ["--install", str(folder), "--prefix", str(package)],
        ):
            subprocess.run([cmake, *step], check=True, env=environment)


class FreshBuild(build):
    """Removes Python files of an earlier build: setuptools would put deleted files into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


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


def warn(message: str) -> None:
    print(f"fused-megatron: {message}", file=sys.stderr, flush=True)


def find_compiler() -> list[str] | None:
    """Return the command of a C++20 compiler, or None."""
    wanted = choice("FUSED_MEGATRON_COMPILE")
    if wanted == "off":
        return None
    chosen = os.environ.get("CXX")
    candidates = [shlex.split(chosen)] if chosen else [["c++"], ["g++"], ["clang++"]]
    reason = "none of c++, g++, clang++ is on PATH"
    for command in candidates:
        # Compile a file: macOS has a c++ that only offers to install a compiler.
        probe = [*command, "-std=c++20", "-x", "c++", "-c", "-o", os.devnull, "-"]
        try:
            subprocess.run(probe, input="#include <span>\n", text=True, capture_output=True, check=True)
            return [shutil.which(command[0]) or command[0], *command[1:]]
        except FileNotFoundError:
            if chosen:
                reason = f"CXX={chosen} was not found"
        except subprocess.CalledProcessError as error:
            reason = f"{shlex.join(command)} does not compile C++20: {error.stderr.strip()}"
    if wanted == "on" or chosen:
        raise SetupError(f"no C++20 compiler: {reason}")
    warn(f"no C++20 compiler ({reason}); installing without compiled kernels: all ops run on their slower reference")
    return None


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


def module_folder(name: str) -> Path:
    """Return the folder of an installed package, without importing it (torch takes seconds)."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SetupError(f"{name} is needed to compile fused-megatron: pip install {name}, or build with isolation")
    return Path(spec.origin).parent


def nvcc_requirements() -> list[str]:
    """Return the build requirements besides pyproject.toml: nvcc if it is required and missing."""
    return CUDA_REQUIREMENTS if choice("FUSED_MEGATRON_CUDA") == "on" and find_nvcc() is None else []


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["fused_megatron", "fused_megatron.*"]), "fused_megatron.kernels"],
        package_dir={"fused_megatron.kernels": "kernels"},
        ext_modules=[Extension("fused_megatron._dataset_index", sources=[])],
        # Only for egg_info, by which pip asks: in any other command setuptools itself would try to install it.
        setup_requires=nvcc_requirements() if "egg_info" in sys.argv else [],
        cmdclass={
            "build": FreshBuild,
            "build_ext": CMakeBuild,
            "editable_wheel": EditableWheel,
            "egg_info": EggInfo,
        },
    )
