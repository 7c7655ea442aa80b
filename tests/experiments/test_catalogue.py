"""Start here when a file of fused_megatron/experiments/tables does not load, or has an experiment with a wrong name."""

import csv
from pathlib import Path

import pytest

from fused_megatron.checks import InputError
from fused_megatron.experiments.catalogue import FOLDER, all_experiments, find_experiments, read_table
from fused_megatron.experiments.formulas import evaluate, sizes_of_run
from fused_megatron.experiments.paper_scale import published_figures
from fused_megatron.planning.prediction.published_runs import tutorial_config

TUTORIAL = Path(__file__).parents[2] / "benchmarks" / "published" / "tutorial_experiments.csv"
MOST_RANKS = 8


# Pipelines of 64 ranks and 512 microbatches, and a search of layouts of 768 GPUs, take a quarter of a minute.
LONG = {"trillion", "planner"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in LONG else [])
        for path in sorted(FOLDER.glob("*.toml"))
    ],
)
def test_every_table_has_runs_that_start_and_published_runs_that_are_predicted(path: Path) -> None:
    for each in read_table(path):
        assert each.entry.statements and each.entry.title and each.entry.why, each.entry.id
        for name, case in each.cases.items():
            config = each.config(name)
            assert config.parallel.num_ranks <= MOST_RANKS, name
            names = {
                **sizes_of_run(config),
                "parameters": 1.0,
                "steps": 1.0,
                "planned_bytes": 1.0,
                "planned_weights": 1.0,
                "step_ms": 1.0,
            }
            for statement in each.entry.statements if not case.sleeps else ():
                if statement.kind != "order" and name in (statement.cases or each.entry.cases):
                    evaluate(statement.formula, names)
        figures = published_figures(each)
        assert all(figure.predicted is None or figure.predicted >= 0 for figure in figures)


def test_no_case_and_no_published_run_is_left_unused() -> None:
    for path in FOLDER.glob("*.toml"):
        experiments = read_table(path)
        table = experiments[0].table
        assert set(table.cases) == {name for each in experiments for name in each.entry.cases}, path
        assert set(table.paper_runs) == {name for each in experiments for name in each.entry.paper}, path


def test_the_published_runs_are_the_rows_of_the_tutorial() -> None:
    """Experiment 100 x the table's hundred + the row's number has the config and the figures of the row."""
    checked = 0
    with TUTORIAL.open(encoding="utf-8", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    for row in rows.values():
        number = _id_of(row["src_table"], row["src_row"])
        if number not in all_experiments():
            continue
        each = all_experiments()[number]
        assert row["src_row"] in each.entry.paper, row["id"]
        run = each.table.paper_runs[row["src_row"]]
        time = {"step_ms": float(row["step_ms"])} if row["step_ms"] else {}
        memory = {"memory_gb": float(row["mem_GB"])} if row["mem_GB"][:1].isdigit() else {}
        out = {"out_of_memory": 1.0} if "OOM" in row["mem_GB"].upper() + row["note"] else {}
        profiled = {"profile_ms": run.published["profile_ms"]} if "profiled" in row["note"] else {}
        assert run.published == memory | out | time | profiled, row["id"]
        if row["use"] != "SUSPECT":  # without a number of stages
            found, wanted = each.paper_config(row["src_row"]), tutorial_config(row)
            assert (found.model, found.training) == (wanted.model, wanted.training), row["id"]
            assert sizes_of_run(found) == sizes_of_run(wanted), row["id"]
            assert found.parallel.zero_stage == wanted.parallel.zero_stage, row["id"]
        checked += 1
    assert checked >= 13


def _id_of(table: str, row: str) -> int:
    """Return the id of a row: tbl101-R6 is 106, tbl203-R11 is 211, tbl280-C1 is 281."""
    hundred = int(table[3:]) // 100 * 100 + (80 if table == "tbl280" else 0)
    return hundred + int(row[1:])


def test_a_wrong_id_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"id='114' must be .* \(nearest: 111, 112, 113; all: "):
        find_experiments(["114"])
    with pytest.raises(InputError, match=r"id='zero' must be the number of an experiment \(all: "):
        find_experiments(["zero"])
    assert [each.entry.id for each in find_experiments(["110", "101"])] == [110, 101]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("vocab_size = 512", "vocab_sise = 512", "case one: unknown key model.vocab_sise"),
        ("id = 101", "number = 101", "unknown field `number`"),
        ('cases = ["one"]', 'cases = ["two"]', "experiment 101: .'two'. must be one of cases"),
    ],
)
def test_a_fault_of_a_table_is_one_line(tmp_path: Path, before: str, after: str, message: str) -> None:
    text = (FOLDER / "zero.toml").read_text(encoding="utf-8")
    assert before in text
    path = tmp_path / "zero.toml"
    path.write_text(text.replace(before, after, 1), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_table(path)[0].config("one")


def test_formulas_are_arithmetic_and_nothing_else() -> None:
    assert evaluate("(6 + 12 / dp) * -parameters // 2", {"dp": 4, "parameters": 3}) == -14
    assert evaluate("max(1, min(dp, 3))", {"dp": 4}) == 3
    for formula, message in (
        ("6 + 12 / tp", "name='tp' must be one of dp"),
        ("__import__('os')", "must be arithmetic"),
        ("dp.real", "must be arithmetic"),
        ("1 / 0", "cannot be computed"),
        ("6 +", "cannot be computed"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(formula, {"dp": 4})
