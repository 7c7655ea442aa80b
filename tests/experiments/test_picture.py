"""Start here when the picture of an experiment lacks a panel, or the curve of a run."""

from pathlib import Path

import pytest

from fused_megatron.benchmarking.report.experiment_results import ExperimentResult, MeasuredRun
from fused_megatron.experiments.picture import draw_experiment

CASES = ("one", "two", "three", "four", "five", "six", "seven")  # more than colours


def result_of(*runs: MeasuredRun) -> ExperimentResult:
    return ExperimentResult(
        id=1,
        title="t",
        why="w",
        date="2026-01-01",
        seconds=1.0,
        source="s",
        runs=list(runs),
        statements=[],
        published=[],
        notes=[],
    )


def test_losses_of_runs_that_train_are_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    losses = {"loss_001": 4.0, "loss_002": 3.0, "loss_end": 3.0}
    trained = [MeasuredRun(case, "pp=4", 4, losses) for case in CASES]
    assert draw_experiment(result_of(*trained, MeasuredRun("other", "pp=4", 4, {"held": 1.0})), tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text(encoding="utf-8")
    # matplotlib writes each text as a comment beside its outlines.
    assert [text.count(f"<!-- {label} -->") for label in (*CASES, "step", "loss")] == [1] * 9
    assert "<!-- other -->" not in text
