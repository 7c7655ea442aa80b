"""Start here when a table of docs/results.md is not what its results file says, or a command writes a wrong page."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from fused_megatron.benchmarking.report.measured_tables import MeasuredTables, shown_tables
from fused_megatron.benchmarking.report.page_tables import table_between, write_tables

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_figures_of_the_results_files() -> None:
    tables = benchmark("results_page").tables()
    assert [len(found) for found in tables.values()] == [4, 1]
    for page, found in tables.items():
        for name, table in found.items():
            assert len(re.findall(r"^\| .*\d+, \d+|\] \|", table, flags=re.MULTILINE)) >= 3
            stored = table_between(page.read_text(encoding="utf-8"), name)
            assert stored == table, "stale: python benchmarks/results_page.py --write"


def test_the_page_has_the_figures_of_fused_models() -> None:
    pytest.importorskip("transformers")
    models = benchmark("fused_models")
    found = json.loads(models.RESULTS.read_text(encoding="utf-8"))
    assert [row["model"] for row in found["rows"]] == [*models.MODELS]
    assert table_between(TEXT, models.NAME) == models.table(found), "stale: see benchmarks/fused_models.py"


KEPT = [path for path in sorted((ROOT / "docs" / "results").glob("*.json")) if "page" in json.loads(path.read_text())]


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_pages_show_the_tables_of_their_runs(file: Path) -> None:
    page = ROOT / "docs" / json.loads(file.read_text(encoding="utf-8"))["page"]
    for name, table in shown_tables(file).items():
        assert table.count("\n| ") >= 1
        assert table_between(page.read_text(encoding="utf-8"), name) == table, f"stale: {file.name} has another run"


def test_a_run_keeps_its_tables_and_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, file = tmp_path / "page.md", tmp_path / "one.json"
    page.write_text("a\n<!-- one: begin -->\n\n<!-- one: end -->\n<!-- two: begin -->\n\n<!-- two: end -->\n")
    run = MeasuredTables(file, page, "make bench-one")
    run.add("one", ["text", "| x | y |", "|---|---|", "| 1 | 2 |", ""])
    run.add("two", ["| z |", "| 3 |"], printed=True)
    assert capsys.readouterr().out == "text\n| x | y |\n|---|---|\n| 1 | 2 |\n\n"
    assert page.read_text().count("|") == 0
    run.write()
    assert table_between(page.read_text(), "one").startswith(
        "| x | y |\n|---|---|\n| 1 | 2 |\n\n`docs/results/one.json`: "
    )
    assert table_between(page.read_text(), "two").startswith("| z |\n|---|\n| 3 |\n\n")
    assert "(`make bench-one`)." in page.read_text()


def test_tables_are_replaced_between_their_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    old = "a\n<!-- one: begin -->\nx\ny\n<!-- one: end -->\nb\n<!-- two: begin -->\n\n<!-- two: end -->\n"
    page.write_text(old)
    write_tables(page, {"two": "2", "one": "1"})
    assert page.read_text() == old.replace("x\ny", "1").replace("begin -->\n\n", "begin -->\n2\n")
    assert table_between(page.read_text(), "two") == "2"
    for wrong in (old.replace("<!-- one: end -->", ""), old + old, "\n<!-- one: end -->\n<!-- one: begin -->\n"):
        page.write_text(wrong)
        with pytest.raises(ValueError, match="name=one: the page must have the lines"):
            write_tables(page, {"one": "1"})
        assert page.read_text() == wrong


MEASURED = re.compile(r"\| -?\d[\d,.]*%? ?x? ?[\[|]|\d ms\b|\d\.\d+x\b")
BY_HAND = re.compile(r"read by hand[^.;:|]*? on 20\d\d-\d\d-\d\d", flags=re.IGNORECASE)


def measured_by_hand() -> dict[str, str]:
    """Return the sections that name a benchmark and have figures outside of the tables that a command writes."""
    found = {}
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = re.sub(
            r"<!-- (.*?): begin -->.*?<!-- \1: end -->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL
        )
        for section in re.split(r"^(?=##)", text, flags=re.MULTILINE):
            if re.search(r"`make bench-|`benchmarks/generation", section) and MEASURED.search(section):
                found[f"{path.name}: {section.partition(chr(10))[0]}"] = section
    return found


def test_figures_that_no_command_writes_say_when_they_were_read() -> None:
    found = measured_by_hand()
    assert len(found) >= 3
    assert [name for name, section in found.items() if not BY_HAND.search(section)] == []
