"""Start here when a run dies because its output is closed."""

import os
import sys
from pathlib import Path

import pytest

from fused_megatron.training.progress import Reporter


def test_a_reader_that_is_gone_ends_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        reporter = Reporter(True, 1)
        with reporter.steps(0, 5):
            reporter.step(1, 2.0, 3.0, 4.0)
            assert reporter.is_closed
            reporter.step(2, 2.0, 3.0, 4.0)
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
