"""Start here when `fused-megatron doctor` fails, or does not see what this machine has."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fused_megatron import cli
from fused_megatron.doctor.device_code import device_code, runs_on, toolkit_release
from fused_megatron.doctor.machine import Question, parse_driver_cuda, parse_gpus, parse_links
from fused_megatron.doctor.network import Lookup, Lookups, find_network
from fused_megatron.extension import LIBRARY

ROOT = Path(__file__).parents[2]


def doctor(*arguments: str, timeout: float = 60, path: Path | None = None, **variables: str) -> tuple[int, str]:
    """Run the doctor in a process whose import path begins with `path`; return its exit code and output."""
    folders = [str(folder) for folder in (path, ROOT) if folder] + [os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "fused_megatron", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), **variables},
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_real_run() -> None:
    code, said = doctor("--json")
    facts = json.loads(said)
    assert code == (0 if facts["can_train"] else 1)
    broken = [finding for finding in facts["findings"] if finding["level"] == "broken"]
    assert facts["can_train"] == (not broken)
    assert facts["torch"]["backends"]["gloo"] and facts["network"]["loopback_ms"] > 0
    assert {package["name"] for package in facts["installation"]["packages"]} >= {"torch", "numpy", "tokenizers"}
    ops = {op["op"]: op for op in facts["library"]["ops"]}
    assert {"layer_norm", "cross_entropy", "linear_cross_entropy", "rotary_embedding"} <= set(ops)
    assert "cross_entropy_merge" not in ops
    if LIBRARY.exists():
        assert facts["library"]["loads"] and {op["cpu"] for op in ops.values()} == {"kernel"}
    assert facts["machine"]["cores"] >= 1 and facts["machine"]["memory_gb"] > 0.1
    assert facts["environment"].get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS")


@pytest.mark.slow  # in the fast part, tests/test_extension.py starts without a library
def test_without_the_library() -> None:
    code, said = doctor(FUSED_MEGATRON_LIBRARY="")
    assert code == 0 and "unset FUSED_MEGATRON_LIBRARY" in said and "CPU: reference" in said


@pytest.mark.slow
def test_a_damaged_library(tmp_path: Path) -> None:
    (tmp_path / "cut.so").write_bytes(b"\x7fELF no more")
    code, said = doctor(FUSED_MEGATRON_LIBRARY=str(tmp_path / "cut.so"))
    assert code == 1 and "broken: FUSED_MEGATRON_LIBRARY=" in said and "does not load" in said


def test_torch_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open')")
    code, said = doctor(path=tmp_path)
    assert code == 1 and "does not import: ImportError: libcudart.so.13: cannot open" in said
    assert "pip install --force-reinstall" in said and "Traceback" not in said


def test_no_dependency_at_all() -> None:
    """An interpreter without site-packages, as after `pip install --no-deps`."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "fused_megatron", "doctor"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "broken: torch is missing" in done.stdout and 'pip install --upgrade "torch>=2.13"' in done.stdout


def test_unknown_arguments_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--jsn"]) == 2
    assert "unknown option --jsn (options: --json, --data PREFIX, --config CONFIG.toml)" in capsys.readouterr().err
    assert cli.main(["doctor", "--config"]) == 2
    assert "--config needs a .toml file" in capsys.readouterr().err
    assert cli.main(["doctor", "--config", "nowhere.toml"]) == 2
    assert "nowhere.toml" in capsys.readouterr().err
    assert cli.main(["doctor", "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_a_name_server_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_megatron.doctor.network.LOOKUP_PATIENCE_S", 0.2)
    monkeypatch.setattr(socket, "getnameinfo", lambda *_: time.sleep(120))
    monkeypatch.setattr(socket, "gethostname", lambda: "nowhere.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: (_ for _ in ()).throw(socket.gaierror("unknown")))
    begun = time.monotonic()
    network = find_network(Lookups(), gloo=False)
    assert time.monotonic() - begun < 60
    assert network.localhost_lookup_s is None
    assert network.host_addresses == () and network.host_lookup_s is not None


def test_lookup_returns_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_megatron.doctor.network.LOOKUP_PATIENCE_S", 60)
    result, seconds = Lookup(lambda: 3).result()
    assert result == 3 and seconds is not None and seconds < 60


def test_a_program_that_hangs_or_fails_has_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_megatron.doctor.machine._PATIENCE_S", 0.2)
    assert Question("sleep", "30").answer is None
    assert Question("no-such-program-anywhere").answer is None
    assert Question("false").answer is None
    assert Question("cat", stdin="text").answer == "text"


def test_output_of_nvidia_smi() -> None:
    gpus, driver = parse_gpus("NVIDIA H100 80GB HBM3, 9.0, 81559, 580.65\nNVIDIA H100 80GB HBM3, 9.0, [N/A], 580.65\n")
    assert [gpu.capability for gpu in gpus] == ["9.0", "9.0"] and driver == "580.65"
    assert gpus[0].memory_gb == pytest.approx(85.5, abs=0.1)
    assert parse_gpus("NVIDIA-SMI has failed because it couldn't communicate") == ((), None)
    matrix = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-31\t0
GPU1\tNV18\t X \tSYS\tSYS\t0-31\t0
GPU2\tSYS\tSYS\t X \tSYS\t32-63\t1
NIC0\tPIX\tSYS\tSYS\t X
"""
    assert parse_links(matrix) == {"NV18": 1, "SYS": 2}
    assert parse_links("") == {}
    table = "| NVIDIA-SMI 580.65.06    Driver Version: 580.65.06    CUDA Version: 13.0     |"
    assert parse_driver_cuda(table) == "13.0" and parse_driver_cuda("") is None


def test_device_code_of_a_fat_binary(tmp_path: Path) -> None:
    def entry(kind: int, arch: int, flags: int, payload: bytes) -> bytes:
        header = struct.pack("<HHIQIIIIQQQQ", kind, 0x101, 64, len(payload), 0, 0, 0, arch, 0, flags, 0, 0)
        return header[:64] + payload

    entries = entry(2, 80, 0x11, b"x" * 24) + entry(2, 90, 0x100011, b"") + entry(1, 100, 0x8011, b"y" * 8)
    file = tmp_path / "library.so"
    magic = struct.pack("<I", 0xBA55ED50)
    file.write_bytes(b"ELF" + magic + struct.pack("<HHQ", 1, 16, len(entries)) + entries + b"tail" + magic)
    assert device_code(file) == ("sm_80", "sm_90a", "ptx_100")
    (tmp_path / "empty.so").touch()
    assert device_code(tmp_path / "empty.so") == () and toolkit_release(tmp_path / "empty.so") is None
    assert toolkit_release(file) is None
    file.write_bytes(file.read_bytes() + b"\0Cuda compilation tools, release 13.0, V13.0.88\0")
    assert toolkit_release(file) == "13.0"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_device_code_of_a_file_from_nvcc(tmp_path: Path) -> None:
    (tmp_path / "kernel.cu").write_text("__global__ void k(int* x) { *x = 1; }")
    kinds = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"]
    command = ["nvcc", "-fatbin", *(f"-gencode={kind}" for kind in kinds), "kernel.cu", "-o", "kernel.fatbin"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert device_code(tmp_path / "kernel.fatbin") == ("sm_80", "sm_90a", "ptx_90")


@pytest.mark.parametrize(("capability", "code"), [
    ("8.0", "sm_80"), ("8.9", "sm_80"), ("9.0", "sm_90a"), ("10.0", "sm_100a"), ("10.3", "ptx_100"),
    ("12.0", "ptx_100"), ("7.5", None),
])  # fmt: skip
def test_which_code_a_gpu_runs(capability: str, code: str | None) -> None:
    assert runs_on(("sm_80", "sm_90a", "sm_100a", "ptx_100"), capability) == code
    assert runs_on((), capability) is None
