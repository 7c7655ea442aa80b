"""Start here when `fused-megatron experiment` prints a wrong list or table, or loses results."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fused_megatron.cli import main
from fused_megatron.experiments.catalogue import all_experiments


def experiment(*words: str) -> int:
    return main(["experiment", *words])


def test_list_and_show_start_no_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert experiment("list") == 0
    listed = capsys.readouterr().out
    assert all(f"| {number} | " in listed for number in all_experiments())
    page = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert listed.strip() in page, "write the output of `fused-megatron experiment list` into docs/experiments.md"
    assert experiment("show", "110") == 0
    shown = capsys.readouterr().out
    for text in ("State falls as 6 + 12/d", "(6 + 12 / dp) * parameters", "dp8_zero1", "| R8 |", "| 74.9 |"):
        assert text in shown


def test_a_list_needs_no_torch() -> None:
    code = (
        "import sys; from fused_megatron.cli import main; main(['experiment', 'list']); print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "119"], "id='119' must be the number of an experiment (nearest: "),
        (["run"], "run needs an id, such as 106 (all ids: fused-megatron experiment list)"),
        (["perform"], "must be one of list, show, run, all, completion"),
        (["completion", "tcsh"], "shell='tcsh' must be one of bash, zsh, fish"),
        (["run", "101", "--output", "/proc/none"], "output=/proc/none cannot be written"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert experiment(*words) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_a_run_writes_its_result_and_its_picture_and_report_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert experiment("run", "101", "103", "--output", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "Weights, gradients and optimizer state take 2 + 4 + 12 bytes a parameter: holds" in printed
    assert "2 of 2 experiments hold" in printed
    result = json.loads((tmp_path / "101.json").read_text(encoding="utf-8"))
    (run,) = result["runs"]
    assert run["figures"]["state"] == 18 * run["figures"]["parameters"]
    picture = (tmp_path / "101.svg").read_text(encoding="utf-8")
    assert picture.startswith("<?xml") and "#7d7d7d" in picture and "#ffffff" not in picture
    assert main(["report", str(tmp_path / "101.json")]) == 0
    reported = capsys.readouterr().out.strip().splitlines()
    assert len(reported) > 10 and all(line in printed.splitlines() for line in reported)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "has version=9 of an experiment; this release reads 1"),
        ({"id": "x"}, "is damaged"),
    ],
)
def test_report_refuses_a_damaged_result(
    change: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "101.json"
    path.write_text(json.dumps({"format": "fused-megatron experiment", "version": 1, **change}), encoding="utf-8")
    assert main(["report", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert experiment("completion", "bash") == 0
    script = capsys.readouterr().out
    ask = 'COMP_WORDS=(fused-megatron experiment run 10); COMP_CWORD=3; _fused_megatron; echo "${COMPREPLY[*]}"'
    found = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(number) for number in all_experiments() if str(number).startswith("10")]
    for shell in ("zsh", "fish"):
        assert experiment("completion", shell) == 0
        assert "106" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_leaves_the_finished_results(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fused_megatron", "experiment", "all", "--output", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 300
        while not (tmp_path / "102.json").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "experiments hold" in output and "| 101 |" in output
    assert main(["report", *(str(path) for path in tmp_path.glob("*.json"))]) == 0
