"""Start here when an experiment over a slow cable counts wrong bytes, or does not say why it has none."""

import os
import subprocess
from pathlib import Path

import pytest

from fused_megatron.checks import InputError
from fused_megatron.experiments.catalogue import FOLDER, Experiment, all_experiments, read_table
from fused_megatron.experiments.measured_link import measure_on_link, why_no_link
from fused_megatron.experiments.run_experiment import run_experiment

MODEL = "num_layers = 4, hidden_size = 256, num_heads = 8"
needs_a_link = pytest.mark.skipif(why_no_link() is not None, reason=f"no cable here: {why_no_link()}")


@pytest.fixture
def small(tmp_path: Path) -> dict[int, Experiment]:
    """The experiments over a cable with a model that a core computes in milliseconds."""
    text = (FOLDER / "slow_link.toml").read_text(encoding="utf-8")
    assert MODEL in text
    path = tmp_path / "slow_link.toml"
    path.write_text(text.replace(MODEL, "num_layers = 2, hidden_size = 64, num_heads = 4"), encoding="utf-8")
    return {each.entry.id: each for each in read_table(path)}


@needs_a_link
@pytest.mark.parametrize("number", [pytest.param(662, marks=pytest.mark.slow), 663])
def test_the_kernel_counts_the_bytes_of_the_formulas(small: dict[int, Experiment], number: int) -> None:
    result = run_experiment(small[number])
    assert [each for each in result.statements if not each.timed and not each.holds] == []
    cables = {run.case: run for run in result.runs if run.case.startswith("cable_")}
    assert len(cables) >= 2 and len(result.statements) == len(small[number].entry.statements)
    for run in cables.values():
        assert "cable of " in run.layout
        # A limit holds however busy the machine is: 256 KiB pass at once, at the begin of each step.
        assert run.figures["link_ms"] <= run.figures["step_ms"] + 8e-3 * 2**18 / 100
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"fm-{os.getpid()}-" not in left


def test_without_root_or_tools_the_rest_runs_and_one_line_says_why(
    small: dict[int, Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run_experiment(small[663])
    assert [run.case for run in result.runs] == ["tp2", "pp2"]
    (statement,) = result.statements
    assert statement.holds and statement.quantity == "all_reduce_tp"
    why = why_no_link()
    assert why and result.notes[0] == f"cable_pp2, cable_tp2 and 4 statements left out here: {why}"


def test_every_experiment_over_a_cable_says_something_without_it() -> None:
    linked = [each for each in all_experiments().values() if any(case.link_mbit_per_s for case in each.cases.values())]
    assert len(linked) == 3
    for each in linked:
        names = {name for name, case in each.cases.items() if case.link_mbit_per_s is None}
        assert names and any(names.issuperset(statement.cases or each.cases) for statement in each.entry.statements)


def test_a_cable_has_two_ends(small: dict[int, Experiment]) -> None:
    config = all_experiments()[112].config("dp8")
    with pytest.raises(InputError, match="case dp8: link_mbit_per_s needs 2 ranks, one at each end; this case has 8"):
        measure_on_link({"dp8": (config, 100.0)}, 60.0)
