"""Start here when a table of docs/results.md is not what its results file says, or a command writes a wrong page."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

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
    page = benchmark("results_page")
    tables = page.tables()
    assert [len(table.splitlines()) > 9 for table in tables.values()] == [True] * 3
    for name, table in tables.items():
        assert table_between(TEXT, name) == table, "stale: python benchmarks/results_page.py --write"


def test_the_page_has_the_figures_of_fused_models() -> None:
    pytest.importorskip("transformers")
    models = benchmark("fused_models")
    found = json.loads(models.RESULTS.read_text(encoding="utf-8"))
    assert [row["model"] for row in found["rows"]] == [*models.MODELS]
    assert table_between(TEXT, models.NAME) == models.table(found), "stale: see benchmarks/fused_models.py"


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
