"""Start here when the Dockerfile does not build, or its image lacks a program."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
# These need root and a container.
OF_ROOT = ("apt-get", "useradd")


def instructions(name: str) -> list[str]:
    """Return what follows each instruction of this name."""
    return re.findall(rf"^{name} (.*)$", TEXT, flags=re.MULTILINE)


def test_the_image_has_a_user_and_a_variant_without_gpu() -> None:
    assert len(instructions("FROM")) == 2 and instructions("ARG").count("DEVICE=gpu") == 2
    last = TEXT.split("\nFROM ")[-1]
    assert "\nUSER trainer\n" in last and "\nRUN " not in last.split("\nUSER ")[1]
    assert instructions("WORKDIR")[-1] == "/shared" and "mkdir /shared && chown trainer /shared" in last
    assert "://" not in TEXT and "\\\n" not in TEXT  # no registry of its own; the test below reads whole lines
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "build", "fused_megatron/*.so"} <= {*ignored}
    # With a GPU torch and the kernels are for CUDA; Triton needs a C compiler.
    assert "FUSED_MEGATRON_CUDA=$(test" in TEXT and "gcc libc6-dev" in last


@pytest.mark.slow
def test_the_lines_of_the_image_run_in_a_fresh_environment(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.split("\n"):
        if (ROOT / name).is_file():
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    lines = [line for line in instructions("RUN") if not any(word in line for word in OF_ROOT)]
    assert len(lines) == 4 and len(instructions("RUN")) == 7
    path = f"{tmp_path / 'venv' / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    # Nothing is compiled: that is the subject of test_packaging.py.
    own = {"DEVICE": "cpu", "TORCH_INDEX": "", "FUSED_MEGATRON_COMPILE": "off", "PATH": path, "PYTHONPATH": ""}
    outputs = []
    for line in [*lines, "torchrun --help", "fused-megatron launch slurm --help"]:
        line = line.replace("/opt/venv", str(tmp_path / "venv"))
        done = subprocess.run(
            ["bash", "-euc", line],
            cwd=tmp_path / "source",
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        outputs.append(done.stdout)
        assert done.returncode == 0, f"{line}\n{done.stdout}"
    assert outputs[3].strip() == "0.1.0" and "usage: torchrun" in outputs[4] and "launch slurm" in outputs[5]
