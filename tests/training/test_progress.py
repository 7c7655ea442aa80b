"""Start here when a run dies because its output is closed."""

import io
import os
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fused_megatron.training.progress import Reporter, StepFigures

FIGURES = StepFigures(2.0, 0.5, 0.25, 3000.0, 4.0, 0.31, 1_500_000_000)


def test_a_reader_that_is_gone_ends_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        reporter = Reporter(True, 1)
        with reporter.steps(0, 5):
            reporter.step(1, FIGURES)
            assert reporter.is_closed
            reporter.step(2, FIGURES)
            reporter.say("more")
            reporter.table("Results", {"a": "b"})
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())  # what is left in the buffer


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        reporter = Reporter(True, 1)
        reporter.say("more")
        assert not reporter.is_closed
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())


WIDTHS = [
    (200, "loss 2.000 (held-out 2.500)  3,000 tokens/s  250 ms/step  norm 0.50  MFU 31.0%  1.5 GB"),
    (120, "loss 2.000 (held-out 2.500)  3,000 tokens/s"),
    (60, "loss 2.000 (held-out 2.500)"),
]


@pytest.mark.parametrize(("width", "wanted"), WIDTHS)
def test_the_bar_has_the_figures_that_fit_on_a_line(width: int, wanted: str) -> None:
    reporter = Reporter(True, 1)
    output = io.StringIO()
    reporter.console = Console(file=output, width=width, force_terminal=True, legacy_windows=False)
    with reporter.steps(0, 2000):
        reporter.held_out(2.5)
        reporter.step(1, FIGURES)
        assert reporter._progress is not None
        assert reporter._progress.tasks[0].fields["status"] == wanted
    lines = [re.sub(r"\x1b\[[^m]*[A-Za-z]", "", line) for line in output.getvalue().splitlines()]
    assert max(map(len, lines)) <= width + 20  # cursor movements
