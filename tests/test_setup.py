"""Start here when a build takes another torch or compiler than it should, or does not say what it does."""

import fcntl
import os
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

# The modules of setup.py, imported as pip's isolated environment does: packages of this environment are hidden.
HIDDEN = """
import sys, sysconfig, setuptools
sys.path[:] = ["."] + [folder for folder in sys.path if not folder.endswith("site-packages")]
import setup
"""


def run(code: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    own = {name: value for name, value in os.environ.items() if name not in ("FUSED_MEGATRON_COMPILE", "CUDACXX")}
    given = {**own, **environment}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=300)


FIND = """
import os
print(setup.find_torch(), setup.build_requirements())
for folder in sys.argv[1:]:
    sysconfig.get_path = lambda scheme: folder
    print(setup.find_torch(), setup.build_requirements())
os.environ["FUSED_MEGATRON_COMPILE"] = "off"
setup.find_compiler.cache_clear()
print(setup.build_requirements())
"""


def test_torch_is_a_build_requirement_where_pip_hides_none_that_is_new_enough(tmp_path):
    for version in ("2.12.1", "1.13.0"):
        stable = tmp_path / version / "torch" / "include" / "torch" / "csrc" / "stable"
        stable.mkdir(parents=True)
        (stable / "library.h").touch()
        (tmp_path / version / "torch" / "version.py").write_text(f"__version__ = '{version}+cpu'\n")
    folders = [str(tmp_path / name) for name in ("none", "2.12.1", "1.13.0")]
    ran = run(HIDDEN + FIND, *folders, FUSED_MEGATRON_CUDA="off")
    installed, *others, uncompiled = ran.stdout.splitlines()
    assert installed == f"{Path(torch.__file__).parent} []", ran.stderr
    assert others == ["None ['torch==2.13.0']"] * 3
    assert uncompiled == "[]"


# What the build would compile for CUDA, without compiling it.
CHOICE = """
import setup
from setuptools import Distribution
class Chosen(setup.CMakeBuild):
    def compile(self, compiler, nvcc):
        print(nvcc)
build = Chosen(Distribution())
build.run()
"""


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="a machine with a GPU")
@pytest.mark.parametrize(
    ("wanted", "gpu", "compiles"), [("auto", False, False), ("auto", True, True), ("on", False, True)]
)
def test_cuda_is_compiled_for_a_gpu_or_on_request(tmp_path, wanted, gpu, compiles):
    for name, says in (("nvcc", ""), *([("nvidia-smi", "GPU 0: NVIDIA H100")] if gpu else [])):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {says}\n")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    ran = run(CHOICE, FUSED_MEGATRON_CUDA=wanted, CUDACXX=str(tmp_path / "nvcc"), PATH=path)
    assert ran.stdout == f"{tmp_path / 'nvcc' if compiles else None}\n", ran.stderr
    assert ("no GPU: only CPU kernels are compiled (FUSED_MEGATRON_CUDA=on" in ran.stderr) is not compiles


def test_lines_reach_the_terminal_from_which_pip_keeps_them():
    terminal, other_end = os.openpty()

    def lead_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(other_end, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-c", "import setup; setup.say('compiling')"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=lead_the_terminal)
    os.close(other_end)
    assert ran.stderr == "fused-megatron: compiling\n"
    assert os.read(terminal, 1000) == b"\rfused-megatron: compiling\r\n"
    os.close(terminal)


STEPS = "print('[1/2] Building CXX object a.o'); print('a.cpp:1: error'); print('[2/2] Linking b.so')"
LOGGED = f"""
import setup, sys
setup.PROGRESS_S = -1.0
with open(sys.argv[1], "w+") as log:
    setup.run_logged([sys.executable, "-c", {STEPS!r} + sys.argv[2]], None, log)
"""


def test_progress_is_said_and_the_log_only_after_a_failure(tmp_path):
    good = run(LOGGED, str(tmp_path / "log"), "")
    assert re.fullmatch(r"fused-megatron: 1 of 2 steps of the build done \(\d+ s\)\n", good.stderr)
    assert "a.cpp:1: error" in (tmp_path / "log").read_text()
    bad = run(LOGGED, str(tmp_path / "log"), "; raise SystemExit(3)")
    assert "a.cpp:1: error" in bad.stderr.splitlines() and "returned non-zero exit status 3" in bad.stderr
