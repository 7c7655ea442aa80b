"""Start here when a page is missing from the site, `make docs` fails, or an error message is not on its page."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from fused_megatron.benchmarking.report.experiment_results import read_experiment
from fused_megatron.experiments.catalogue import find_experiments
from fused_megatron.experiments.run_experiment import formula_names
from fused_megatron.experiments.trend_checks import judge
from fused_megatron.planning.verify.planted import word_of
from fused_megatron.testing.planted_faults import FAULTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")}
SECTIONS = ("Why", "What", "How", "The code", "The experiment", "What goes wrong")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_menu_names_pages_once(hooks: ModuleType) -> None:
    named = hooks.named_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len({*named}) == len(named) > 30 and {*named} <= {*PAGES, hooks.ERRORS}


def test_a_concept_has_all_sections_and_its_faults_exist() -> None:
    concepts = {name: text for name, text in PAGES.items() if name.startswith("concepts/")}
    assert len(concepts) >= 8
    known = {word_of(fault) for fault in FAULTS}
    named = set()
    for name, text in concepts.items():
        assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == [*SECTIONS], name
        wrong = text.split("## What goes wrong")[1]
        named |= {word for word in re.findall(r"(\w+)`", wrong) if len(word.split("_")) > 2 and word.islower()}
    assert len(named & known) >= 15 and named - known <= {"expert_load_max_over_mean"}


def test_a_concept_shows_a_stored_run_of_its_experiment() -> None:
    shown = set()
    for name, text in PAGES.items():
        ran, stored = re.findall(r"`fused-megatron experiment run (\d+)`", text), re.findall(r"experiment_(\d+)", text)
        if name.startswith("concepts/") and name != "concepts/checkpoints.md":
            # 661 compares times, which depend on the load of the machine.
            assert len(ran) == 1 and stored == [number for number in ran if number != "661"], name
            shown |= {*stored}
    assert len(shown) >= 7


def test_stored_experiments_hold_in_the_catalogue_of_today() -> None:
    """Formulas of today, with the figures of the stored runs."""
    stored = sorted((DOCS / "results").glob("experiment_*.json"))
    assert len(stored) >= 10
    for path in stored:
        result = read_experiment(path)
        assert result is not None and path.name == f"experiment_{result.id}.json"
        (experiment,) = find_experiments([str(result.id)])
        assert (result.title, result.why) == (experiment.entry.title, experiment.entry.why), path.name
        figures = {run.case: run.figures for run in result.runs}
        assert [*figures] == [*experiment.entry.cases], path.name
        sizes = {name: formula_names(experiment.config(name), experiment.cases[name]) for name in figures}
        again = [judge(statement, sizes, figures) for statement in experiment.entry.statements]
        assert [each.text for each in again if not each.holds] == [], path.name
        assert [each.text for each in again] == [each.text for each in result.statements], path.name


def test_outputs_stand_below_their_commands(hooks: ModuleType) -> None:
    line = "fused-megatron schedule simulate 1f1b --ranks 4 --microbatches 8"
    page = hooks.with_outputs(f"a\n```run\n{line} | head -1\n{line.replace('8', '4')} | head -1\n```\nb\n")
    shown = f"$ {line} | head -1\nmakespan 33, bubble 9 (27.3% of it)\n...\n$ {line.replace('8', '4')} | head -1\n"
    assert page == f"a\n```console\n{shown}makespan 21, bubble 9 (42.9% of it)\n...\n```\nb\n"
    for wrong, message in (("ls", "only lines such as"), (f"! {line}", "exit code 0"), ("fused-megatron x", "code 2")):
        with pytest.raises(RuntimeError, match=message):
            hooks.output_of(wrong)
    lines = {line for text in PAGES.values() for line in hooks.lines_of(text)}
    assert len(lines) > 15 and all(line.removeprefix("! ").startswith("fused-megatron ") for line in lines)


def test_marks_of_blocks_are_not_shown(hooks: ModuleType) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    marked = "```sh parse: needs GPUs\nmake x\n```\n```python run\nx\n```\n"
    assert hooks.on_page_markdown(marked, page, None, []) == "```sh\nmake x\n```\n```python\nx\n```\n"


def test_long_lines_are_wrapped_and_reports_are_tables(hooks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hooks.command_of("x --flag 1") == "$ x --flag 1"
    long = "x" * 70
    assert hooks.command_of(f"{long} --flag {long} --other 2") == f"$ {long} \\\n    --flag {long} --other 2"
    words = " ".join(["12345678"] * 20)
    first, second = hooks.wrapped(f"memory        {words}").splitlines()
    assert len(first) <= hooks.WIDTH < len(first) + 9 and f"{first} {second.strip()}" == f"memory        {words}"
    assert second.startswith(" " * 14 + "1")
    assert all(hooks.wrapped(row) == row for row in (f"| {words} |", f"0  1  2  3  {words}", "", "short  line"))
    outputs = {"show": "plain", "report": "a\n\n| b |\n| --- |\n| 1 |"}
    monkeypatch.setattr(hooks, "output_of", outputs.__getitem__)
    shown = hooks.with_outputs("```run\nshow\nreport\n```\nend\n")
    assert shown == f"```console\n$ show\nplain\n$ report\n```\n\n{outputs['report']}\nend\n"
    shown = hooks.with_outputs("```run\nreport\nshow\n```\nend\n")
    assert shown == f"```console\n$ report\n```\n\n{outputs['report']}\n\n```console\n$ show\nplain\n```\nend\n"


def test_the_page_of_error_messages(hooks: ModuleType) -> None:
    page = hooks.error_page()
    assert page.count("\n| `") > 500
    for start, place in (
        ("gpus_per_node={gpus_per_node} must be at most", "planning/job_files/cluster_job.py"),
        ("launch needs the number of ranks first", "training/launcher.py"),
        ("{name}={value} must be 1 or more", "checks.py"),
    ):
        assert re.search(rf"\| `{re.escape(start)}[^\n]*\| `{place}` \|\n", page), start


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = (tmp_path / "site" / "which_parallelism.html").read_text()
    assert "Of 84 layouts" in shown or "the others fell" in shown
    assert 'href="planner.html"' in shown  # the name of a page has become a link
    home = (tmp_path / "site" / "index.html").read_text()
    assert "site/iframe-worker.js" in home and "unpkg.com" not in home
    assert (tmp_path / "site" / "search" / "search_index.js").exists()
    package = (tmp_path / "site" / "api" / "package.html").read_text()
    assert "<strong>Communication.</strong>" in package and "<details" not in package
    assert [
        name for name in PAGES if f'href="{name.removesuffix(".md")}.html"' not in home and name != "index.md"
    ] == []
