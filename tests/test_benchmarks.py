"""Every benchmark runs, tiny: on the CPU, and on the path of a GPU with one that is none."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fused_megatron.testing.report.results_file import read_results
from fused_megatron.training.kept_pages import uses_glibc

ROOT = Path(__file__).parents[1]


def run(*options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "FUSED_MEGATRON_BENCH", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", *map(str, options)]
    return subprocess.run(command, env=clean | environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_on_the_cpu(tmp_path):
    stored = tmp_path / "stored.json"
    kept = tmp_path / "kept.json"
    done = run("--quick", "-k", "float32 or overhead", f"--benchmark-json={stored}", "--results", kept)
    assert done.returncode == 0, done.stdout + done.stderr
    header, *rows = re.findall(r"^\| .*\|$", done.stdout, re.MULTILINE)
    assert "x eager" in header and "over bound" in header
    assert any(row.startswith("| layer_norm ") for row in rows) and "us a call" in done.stdout
    benchmarks = {b["name"]: b["extra_info"] for b in json.loads(stored.read_text())["benchmarks"]}
    ours, theirs = read_results(kept), read_results(stored)
    assert ours.complete and f"report {os.path.relpath(kept, ROOT)}" in done.stdout
    assert {c.name: c.seconds for c in ours.comparisons} == {c.name: c.seconds for c in theirs.comparisons}
    info = benchmarks["test_layer_norm[float32]"]
    assert set(info["seconds"]) == {"ours", "eager", "compile", "bound"} and info["num_bytes"] > 0
    if uses_glibc():
        assert "malloc keeps its pages for all" in done.stdout
        # In a quick run for the first of them alone.
        assert any(set(info.get("default_malloc_ms", ())) >= {"ours", "eager"} for info in benchmarks.values())


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    kept = tmp_path / "kept.json"
    (tmp_path / "stop.py").write_text(
        "import os, signal, pytest\n"
        "@pytest.hookimpl(trylast=True)\n"
        "def pytest_runtest_teardown():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run("--quick", "-k", "norm and float32", "-p", "stop", "--results", kept, PYTHONPATH=path)
    assert done.returncode == pytest.ExitCode.INTERRUPTED
    results = read_results(kept)
    assert not results.complete and len(results.comparisons) == 1 and results.comparisons[0].ratio("eager")
    # What is not asked for is not kept: part of a run would take the place of a whole one.
    assert not list((ROOT / "benchmarks" / "results").glob(f"{kept.stem}*"))


def test_on_a_gpu_that_is_none():
    done = run("--quick", "--fake-gpu", "H100", "-k", "float32 and (norm or entropy or rotary)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "forward + backward on fake H100" in done.stdout and "% of copy" in done.stdout
    if "liger_kernel" not in sys.modules:
        assert re.search(r"^liger: (not installed|failed)", done.stdout, re.MULTILINE)
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_no_gpu_is_one_line():
    done = run("--gpu")
    assert done.returncode != 0
    assert re.fullmatch(r"ERROR: no GPU: .*", done.stderr.strip())


def test_overlap_without_its_tools_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/overlap_on_a_slow_link.py"]
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and re.fullmatch(r"bench-overlap skipped: .*\n", done.stdout), done.stderr


def rows_of(name: str, *options: object) -> list[str]:
    """The table of a benchmark of pipelines; its own exit code is a verdict on the clock, which is not for here."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return re.findall(r"^\| (.*) \|", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_bubbles_are_measured(tmp_path):
    trace = tmp_path / "trace.json"
    options = ("--ranks", 2, "--schedules", "1f1b", "zb_v", "--times-ms", 10, 10, 10, "--perfetto", trace)
    header, *rows = rows_of("pipeline_bubble.py", *options)
    assert header.startswith("schedule | p | v | m | predicted")
    assert [row.split(" | ")[-2:] for row in rows] == [["2 1", "2 1"], ["4 4", "4 4"]]
    events = json.loads(trace.read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {
        f"{name}, 2 ranks: {what}" for name in ("1f1b", "zb_v") for what in ("predicted", "measured")
    }
