"""Start here when `make bench` fails, or loses what it measured."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fused_megatron.benchmarking.report.results_file import read_results
from fused_megatron.kept_pages import uses_glibc

ROOT = Path(__file__).parents[1]


def run(*options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "FUSED_MEGATRON_BENCH", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", *map(str, options)]
    return subprocess.run(command, env=clean | environment, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow  # test_end_to_end_benchmarks.py measures and reports in the fast part
def test_on_the_cpu(tmp_path):
    stored = tmp_path / "stored.json"
    kept = tmp_path / "kept.json"
    done = run(
        "--quick",
        "-k",
        "(layer_norm or bias_gelu) and float32 or overhead",
        f"--benchmark-json={stored}",
        "--results",
        kept,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Progress lines: the name of a case before it runs, its measurement after.
    assert re.search(r"^\[\d+/\d+\] \w+\[float32\]\n\w.* ms; eager \d", done.stdout, re.MULTILINE)
    header, *rows = re.findall(r"^\| .*\|$", done.stdout, re.MULTILINE)
    assert "x eager" in header and "over bound" in header
    assert any(row.startswith("| layer_norm ") for row in rows) and "us a call" in done.stdout
    benchmarks = {b["name"]: b["extra_info"] for b in json.loads(stored.read_text())["benchmarks"]}
    ours, theirs = read_results(kept), read_results(stored)
    assert ours.complete and f"report {os.path.relpath(kept, ROOT)}" in done.stdout
    assert set(ours.ceilings) == {"copy_gb_per_s", "gemm_gflop_per_s float32", "gemm_gflop_per_s bfloat16"}
    assert all(c.model_flops and c.forward_seconds["ours"] for c in ours.comparisons)
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "plots" / "ops_roofline.png").exists() and "ops_roofline.png" in done.stdout
    assert {c.name: c.seconds for c in ours.comparisons} == {c.name: c.seconds for c in theirs.comparisons}
    info = benchmarks["test_layer_norm[float32]"]
    assert set(info["seconds"]) == {"ours", "eager", "compile", "bound"} and info["num_bytes"] > 0
    if uses_glibc():
        assert "malloc keeps its pages for all" in done.stdout
        # In a quick run only for the first case.
        assert any(set(info.get("default_malloc_ms", ())) >= {"ours", "eager"} for info in benchmarks.values())


@pytest.mark.slow
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
    # Results of a part of the benchmarks are not kept: they would replace the results of a whole run.
    assert not list((ROOT / "benchmarks" / "results").glob(f"{kept.stem}*"))


@pytest.mark.slow
def test_on_a_gpu_that_is_none():
    done = run("--quick", "--fake-gpu", "H100", "-k", "float32 and (layer_norm or rotary)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ops, fake H100, " in done.stdout and "% of roof" in done.stdout
    if "liger_kernel" not in sys.modules:
        assert re.search(r"^liger: (not installed|failed)", done.stdout, re.MULTILINE)
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_what_cannot_be_is_one_line_before_anything_is_measured(tmp_path):
    (tmp_path / "file").touch()
    results = ("--results", tmp_path / "file" / "a.json")
    wanted: dict[tuple, str] = {results: r"ERROR: results=.*a\.json: .* \(--results FILE puts them elsewhere\)"}
    if not os.path.exists("/dev/nvidia0"):
        wanted["--gpu",] = r"ERROR: no GPU: .*"
    for options, line in wanted.items():
        done = run(*options)
        assert done.returncode != 0 and re.fullmatch(line, done.stderr.strip()), done.stderr


def test_all_parts_one_after_the_other(tmp_path, monkeypatch, capfd):
    """A failing part does not stop the next one. Ctrl-C does, but the report is still made."""
    spec = importlib.util.spec_from_file_location("run_all", ROOT / "benchmarks" / "run_all.py")
    run_all = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_all)
    layer = {"op": "MLP", "label": "tp=2", "dtype": "float32", "num_bytes": None, "bars": {}}
    whole = {
        "format": "fused-megatron results",
        "version": 1,
        "theme": "layers",
        "hardware": "here",
        "date": "2026-11-29",
    }
    layer["seconds"] = {"ours": [1.0]}
    written = json.dumps({**whole, "settings": {}, "complete": True, "comparisons": [layer]})
    scripts = {
        "fails": "import sys\nsys.exit(3)",
        "measures": f"import pathlib, sys\npathlib.Path(sys.argv[1]).write_text({written!r})",
        "is interrupted": "import os, signal\nos.kill(os.getppid(), signal.SIGINT)\nraise KeyboardInterrupt",
        "never runs": "print('it runs')",
    }
    parts = []
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
        parts.append((name, 1, (str(tmp_path / f"{name}.py"), str(tmp_path / "measured.json"))))
    monkeypatch.setattr(run_all, "PARTS", tuple(parts))
    monkeypatch.setattr(run_all, "RESULTS", tmp_path)
    assert run_all.main([]) == 130
    said, errors = capfd.readouterr()
    assert "part 3 of 4" in said and "it runs" not in said and "Traceback" not in said + errors
    assert "| MLP tp=2 | float32 | 1000 " in said and "interrupted: the files have what was measured" in said
    monkeypatch.setattr(run_all, "PARTS", tuple(parts[:1]))
    assert run_all.main([]) == 1
    assert "failed: fails" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "name"),
    [("overlap_on_a_slow_link.py", "bench-overlap"), ("context_parallel_on_a_slow_link.py", "bench-ring")],
)
def test_a_slow_link_without_its_tools_is_one_line(tmp_path, script, name):
    command = [sys.executable, ROOT / "benchmarks" / script]
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and re.fullmatch(rf"{name} skipped: .*\n", done.stdout), done.stderr


@pytest.mark.slow
def test_context_parallel_methods_side_by_side():
    rows = rows_of("context_parallel.py", "--lengths", 256, "--rounds", 1, "--work-length", 256)
    assert sum(row.startswith("256 | one document | ") for row in rows) == 1 + 3
    assert sum(row.startswith("256 | documents, window | 8 | ") for row in rows) == 1


def rows_of(name: str, *options: object) -> list[str]:
    """Return the table of a pipeline benchmark; its exit code judges the measured times, which no test here checks."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
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
