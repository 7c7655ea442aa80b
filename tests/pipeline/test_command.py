"""Start here when `fused-megatron schedule` prints, writes or refuses the wrong thing, or is slow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fused_megatron import cli
from fused_megatron.pipeline import SCHEDULES


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert cli.main(["schedule", *map(str, words)]) == code
    output = capsys.readouterr()
    if code == 2:
        assert output.out == "" and len(output.err.splitlines()) == 1, output.err
        return output.err
    return output.out


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "show", name).count("rank ") == 4
    assert "no breach" in run(capsys, "check", name, "--microbatches", 9)
    assert run(capsys, "simulate", name).startswith("makespan ")


def test_formats_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("interleaved_1f1b", "--ranks", 4, "--stages-per-rank", 2, "--microbatches", 9)
    for name, suffix in (("csv", "csv"), ("torch_csv", "csv"), ("json", "json")):
        for lowered in ((), ("--lowered", True)):
            file = tmp_path / f"{name}{len(lowered)}.{suffix}"
            assert run(capsys, "show", *sizes, "--format", name, "--write", file, *lowered) == ""
            assert "no breach" in run(capsys, "check", file)
            assert run(capsys, "simulate", file) == run(capsys, "simulate", *sizes)
    assert run(capsys, "show", *sizes, "--format", "svg").startswith("<svg")
    assert json.loads(run(capsys, "show", *sizes, "--format", "perfetto"))["traceEvents"]


def test_a_broken_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.csv"
    file.write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    said = run(capsys, "check", file, code=1).splitlines()
    assert said[0] == "rank 0, position 1, rule deadlock: 0B0 waits forever"
    assert "deadlocks: rank 0 waits forever at position 1, 0B0" in run(capsys, "simulate", file, code=2)
    file.write_text("0F0,huh\n")
    assert "own.csv: row 0, cell 1: action='huh'" in run(capsys, "check", file, code=2)
    assert "nowhere.json" in run(capsys, "check", tmp_path / "nowhere.json", code=2)


@pytest.mark.parametrize(("words", "message"), [
    (("show", "1f2b"), "schedule='1f2b' must be one of: gpipe"),
    (("show", "1f1b", "--ranks", 0), "num_ranks=0 must be 1 or more"),
    (("show", "1f1b", "--microbatches", 0), "num_microbatches=0 must be 1 or more"),
    (("show", "zb_v", "--stages-per-rank", 3), "stages_per_rank=3 must be 2 for zb_v"),
    (("simulate", "1f1b", "--forward", -1), "must be 0 or more"),
    (("simulate", "1f1b", "--format", "svg"), "format=svg is for show"),
    (("show", "1f1b", "--write", "/nowhere/at/all"), "write=/nowhere/at/all"),
    (("shew", "1f1b"), "shew"),
    (("show",), "schedule"),
], ids=str)  # fmt: skip
def test_bad_words(words: tuple, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in run(capsys, *words, code=2)


def test_it_answers_in_under_a_second_without_torch() -> None:
    command = "schedule show interleaved_1f1b --ranks 4 --stages-per-rank 2 --microbatches 9"
    code = (
        f"import sys, time; from fused_megatron.cli import main; main({command.split()!r}); "
        # Processor time, so that other processes on the machine do not count.
        "assert 'torch' not in sys.modules; print(time.process_time())"
    )
    outputs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=600).stdout]
    outputs += [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=600).stdout]
    assert min(float(output.split()[-1]) for output in outputs) < 1.0
