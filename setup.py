"""Builds the compiled parts with CMake + Ninja and maps kernels/ to fused_megatron.kernels.

Everything that can be said statically is in pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake build for the torch library and the pybind11 helpers; no compiler means no compiled parts."""

    def run(self) -> None:
        if compiler() is None:
            print("fused-megatron: no C++ compiler found; installing without compiled kernels", file=sys.stderr)
            self.extensions = []
            return
        package_folder = ROOT if self.inplace else Path(self.build_lib).resolve()
        build_folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build_folder.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake") or "cmake"
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build_folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFUSED_MEGATRON_CUDA={os.environ.get('FUSED_MEGATRON_CUDA', 'auto')}",
            f"-DFUSED_MEGATRON_PACKAGE_FOLDER={package_folder / 'fused_megatron'}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_folder)], check=True)
        subprocess.run([cmake, "--install", str(build_folder)], check=True)


class EditableWheel(editable_wheel):
    """Links fused_megatron/kernels to ../kernels, so that an editable install sees the same tree as a wheel."""

    def run(self) -> None:
        link = ROOT / "fused_megatron" / "kernels"
        if not link.is_symlink():
            link.symlink_to(Path("..") / "kernels", target_is_directory=True)
        super().run()


def compiler() -> str | None:
    """The C++ compiler that CMake will use, or None."""
    return next(
        (found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := shutil.which(name))),
        None,
    )


setup(
    packages=[*find_packages(include=["fused_megatron", "fused_megatron.*"]), "fused_megatron.kernels"],
    package_dir={"fused_megatron.kernels": "kernels"},
    ext_modules=[Extension("fused_megatron._dataset_index", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "editable_wheel": EditableWheel},
)
