"""Start here when `fused-megatron report` cannot read a results file, or judges two runs wrongly."""

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest

from fused_megatron import cli
from fused_megatron.benchmarking.report.command import ReportArguments, run_report
from fused_megatron.benchmarking.report.describe_run import describe_run
from fused_megatron.benchmarking.report.results_file import Results, read_results, write_results
from fused_megatron.benchmarking.report.two_runs import compare_runs, noise_of
from fused_megatron.benchmarking.side_by_side import Bars, Comparison, Spread
from fused_megatron.benchmarking.timing_devices import CpuDevice, FakeGpu
from fused_megatron.checks import InputError
from fused_megatron.observe.traffic import Traffic


def case(op: str, eager: float, *, noise: float = 0.01, seed: int = 0, load: float = 1.0) -> Comparison:
    """Ours takes 1 ms, the eager function `eager` times that; the load of each round affects both the same."""
    draw = random.Random(seed)
    loads = [load * draw.uniform(1, 3) for _ in range(20)]
    seconds = {"ours": [1e-3 * t for t in loads], "eager": [1e-3 * t * eager * draw.gauss(1, noise) for t in loads]}
    seconds["bound"] = [5e-4 * t for t in loads]
    return Comparison(
        op, "[8, 8]", "float32", 4096, Bars(eager=1.0), seconds, {"compile": "failed: it"}, {},
        {"ours": 9, "eager": 12}, {"ours": Traffic(10, 2), "eager": Traffic(20, 4)}, {"ours": 1.5},
    )  # fmt: skip


def results(*comparisons: Comparison, complete: bool = True, hardware: str = "Xeon, 2 cores") -> Results:
    return Results("ops", hardware, "2026-11-22", {"torch": "2.13.0"}, {}, list(comparisons), complete)


def saved(folder: Path, name: str, *comparisons: Comparison, **options: object) -> Path:
    path = folder / name
    write_results(results(*comparisons, **options), path)  # type: ignore[arg-type]
    return path


def test_round_trip_and_name(tmp_path: Path) -> None:
    wanted = results(case("layer_norm", 2.0), case("rms_norm", 3.0))
    write_results(wanted, tmp_path / "deep" / "file.json")
    assert read_results(tmp_path / "deep" / "file.json") == wanted
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.json"]
    assert wanted.file_name == "ops_xeon-2-cores_202611.json"


def test_one_file_as_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, "a.json", case("layer_norm", 2.0), complete=False)
    assert cli.main(["report", str(path)]) == 0
    said = capsys.readouterr().out
    assert "ops, Xeon, 2 cores, 2026-11-22 (torch 2.13.0)" in said
    assert "interrupted: 1 cases were measured before that" in said
    assert "| layer_norm [8, 8] | float32 |" in said and "eager >= 1x met" in said and "compile: failed: it" in said


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = saved(tmp_path, "good.json", case("layer_norm", 2.0))
    text = good.read_text()
    whole = json.loads(text)
    del whole["comparisons"][0]["seconds"]
    bad = {
        "cut.json": (text[: len(text) // 2], "is no JSON, or cut off"),
        "other.json": ('{"some": "thing"}', "holds no results of make bench"),
        "list.json": ("[1]", "its JSON is no object"),
        "newer.json": (text.replace('"version": 1', '"version": 2'), "has version=2 of the results' format"),
        "fields.json": (json.dumps(whole), "is damaged: seconds must be there"),
        "negative.json": (
            text.replace("[\n     ", "[\n     -1.0,\n     ", 1),
            "is damaged: Expected `float` >= 1e-12 - at `$.comp",
        ),
        "foreign.json": ('{"benchmarks": [], "machine_info": {}}', "pytest-benchmark wrote it for other benchmarks"),
        "nothing.json": ("", "is no JSON, or cut off"),
        "nowhere.json": (None, "No such file"),
    }
    for name, (content, message) in bad.items():
        if content is not None:
            (tmp_path / name).write_text(content)
        for words in ([tmp_path / name], [good, tmp_path / name]):
            assert cli.main(["report", *map(str, words)]) == 2, name
            (line,) = capsys.readouterr().err.splitlines()
            assert name in line and message in line, line


def test_a_file_of_pytest_benchmark(tmp_path: Path) -> None:
    theirs = case("layer_norm + residual", 2.0)
    info = {
        "label": theirs.label, "num_bytes": theirs.num_bytes, "seconds": theirs.seconds, "faults": theirs.faults,
        "notes": {}, "traffic": {}, "peak_bytes": {}, "default_malloc_ms": {}, "bars": [], "gb_per_s": 3.0,
    }  # fmt: skip
    whole = {
        "machine_info": {"python_version": "3.11", "cpu": {"brand_raw": "A Processor"}}, "datetime": "2026-11-22T01:02",
        "benchmarks": [
            {"group": "layer_norm + residual float32", "extra_info": info},
            {"group": "call overhead", "extra_info": {"library_us": [1]}},
        ],
    }  # fmt: skip
    (tmp_path / "theirs.json").write_text(json.dumps(whole))
    read = read_results(tmp_path / "theirs.json")
    assert read.hardware == "A Processor" and read.date == "2026-11-22"
    (found,) = read.comparisons
    assert found.name == theirs.name and found.ratio("eager") == theirs.ratio("eager")


def test_two_runs_of_the_same_code_are_even_whatever_the_load() -> None:
    for seed in range(20):
        (change,) = compare_runs([case("op", 2.0, seed=seed)], [case("op", 2.0, seed=100 + seed, load=3.0)])
        assert change.verdict == "even" and change.beside == "eager"


def test_a_regression_and_an_improvement_are_found_and_noise_is_not() -> None:
    def verdict(before: float, after: float, noise: float) -> str:
        return compare_runs([case("op", before, noise=noise)], [case("op", after, noise=noise, seed=1)])[0].verdict

    assert verdict(2.0, 1.5, 0.01) == "SLOWER"
    assert verdict(2.0, 2.6, 0.01) == "faster"
    assert verdict(2.0, 1.9, 0.01) == "even"  # less than medians differ between runs
    assert verdict(2.0, 1.7, 0.2) == "even"  # within the rounds' own spread
    assert verdict(2.0, 1.0, 0.2) == "SLOWER"


def test_without_an_eager_figure_the_copy_stands_beside() -> None:
    before, after = case("op", 2.0), case("op", 2.0)
    del before.seconds["eager"]
    assert compare_runs([before], [after])[0].beside == "bound"
    first, second = step("tp=2", 2), step("tp=2", 2)
    first.seconds["near"] = [s * 0.9 for s in first.seconds["DTensor"]]
    assert compare_runs([first], [first])[0].beside == "near"
    assert compare_runs([first], [second])[0].beside == "DTensor"  # the best provider is gone
    del before.seconds["bound"]
    assert compare_runs([before], [after])[0].verdict == "-"


def test_noise_is_that_of_both_runs() -> None:
    assert noise_of(Spread(1, 1, 1), Spread(1, 1, 1)) == pytest.approx(1.1)
    wide = noise_of(Spread(1, 1, 1.5), Spread(0.8, 1, 1))
    # A half and a quarter more: their logarithms as independent errors, times 1.5.
    assert wide == pytest.approx(math.exp(1.5 * math.hypot(math.log(1.5), math.log(1.25))))


def test_the_report_of_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = saved(tmp_path, "a.json", case("a", 2.0), case("b", 2.0), case("c", 2.0), case("gone", 2.0))
    wrong = case("c", 2.0)
    wrong.seconds.pop("ours")
    wrong.faults["ours"] = "wrong: output 0 50% off"
    after = saved(tmp_path, "b.json", case("a", 1.2), case("b", 2.0), wrong, case("new", 2.0), hardware="Epyc")
    assert cli.main(["report", str(before), str(after)]) == 1
    said = capsys.readouterr().out
    assert "| a [8, 8] float32 " in said and "SLOWER" in said and "not the same hardware" in said
    assert "no longer measured: c [8, 8] float32: wrong: output 0 50% off" in said
    assert "1 slower, 0 faster, 1 even, 1 without figures in both, 1 only before, 1 only after: a regression" in said
    assert cli.main(["report", str(before), str(before)]) == 0
    assert "4 even: no regression" in capsys.readouterr().out
    assert cli.main(["report", str(before), str(saved(tmp_path, "c.json", case("z", 1.0)))]) == 2
    assert "no case in common" in capsys.readouterr().err


def test_plots_and_a_markdown_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    roofed = [dataclasses.replace(case(op, ratio), model_flops=4096) for op, ratio in (("a", 2.0), ("b", 0.5))]
    path = tmp_path / "a.json"
    ceilings = {"copy_gb_per_s": 8.0, "gemm_gflop_per_s float32": 20.0}
    write_results(dataclasses.replace(results(*roofed), ceilings=ceilings), path)
    words = ["report", path, "--plots", tmp_path / "plots", "--write", tmp_path / "report.md"]
    assert cli.main(list(map(str, words))) == 0
    for name in ("ops_speed_up.png", "ops_copy_speed.png", "ops_roofline.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
        assert name in (tmp_path / "report.md").read_text()
    assert cli.main(["report", str(path), "--write", str(tmp_path / "no" / "folder.md")]) == 2
    assert "No such file" in capsys.readouterr().err


def step(label: str, ranks: int, op: str = "GPT small", seconds: float = 0.5) -> Comparison:
    times = {"ours": [seconds, 1.1 * seconds, seconds], "DTensor": [2 * seconds, 2.1 * seconds, 2 * seconds]}
    return Comparison(
        op, label, "float32", None, Bars(best=1.3), times, {"FSDP2": "not installed"}, {}, {"ours": 8_000_000},
        ranks=ranks, tokens=1000, model_flops=2_000_000_000 * ranks, hardware_flops=3_000_000_000 * ranks,
        breakdown={"ours": {"compute": 0.4, "communication": 0.1}, "DTensor": {"compute": 0.9, "own part": 0.1}},
    )  # fmt: skip


def test_themes_with_training_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    ceilings = {"gemm_gflop_per_s float32, 1 rank": 40.0, "gemm_gflop_per_s float32": 20.0}
    steps = [step("one", 1), step("tp=2", 2), step("tp=2 + sp", 2, seconds=0.6)]
    files = []
    for theme in ("end_to_end", "node"):
        files.append(tmp_path / f"{theme}.json")
        write_results(Results(theme, "8 x H100", "2026-11-22", {}, ceilings, steps, True), files[-1])
    assert cli.main(["report", *map(str, files), "--plots", str(tmp_path / "plots")]) == 0
    said = capsys.readouterr().out
    both, scaling = said.split("node, 8 x H100")
    # 4 GFLOP/s of each rank, of the 40 that one rank reaches without others, and of the 20 of each of two ranks.
    assert "| 10.0% |" in both and "| 20.0% |" in both and "| 15.0% |" in both
    assert "MFU: model FLOPs a step" in both and "GPT small tp=2 float32: DTensor >= 1.3x met" in both
    assert "| 400 (80%)" in both and "own part ms" in both and "FSDP2: not installed [3 cases]" in both
    assert "Weak scaling" not in both and "| GPT small tp=2 + sp | 2 " in scaling and "| 83% " in scaling
    pictures = {"end_to_end_speed_up", "end_to_end_breakdown", "node_speed_up", "node_breakdown", "node_scaling"}
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == pictures
    assert all(f"![{name}]" in said for name in pictures)


def test_many_files_are_grouped_by_theme_and_hardware(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = (saved(tmp_path, f"{n}.json", case("a", n)) for n in (2.0, 1.0))
    other = saved(tmp_path, "other.json", case("a", 3.0), hardware="Epyc")
    assert cli.main(["report", *map(str, (old, other, new))]) == 1
    said = capsys.readouterr().out
    assert "1 slower, 0 faster, 0 even: a regression" in said and "ops, Epyc" in said and "not the same" not in said
    assert cli.main(["report", *map(str, (old, new, old))]) == 2
    assert "3 files of ops on Xeon, 2 cores: at most two can be compared" in capsys.readouterr().err
    assert cli.main(["report", str(saved(tmp_path, "no_case.json"))]) == 0
    assert "no case was measured" in capsys.readouterr().out
    assert cli.main(["report"]) == 2
    assert "make bench writes them" in capsys.readouterr().err


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, "a.json", case("a", 2.0))
    before = path.read_text()

    def full(self: Path, text: str, **_: object) -> None:
        with open(self, "w") as file:
            file.write(text[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            write_results(results(case("b", 2.0)), path)
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(InputError, match=r"plots=.*a\.json"):
        run_report(ReportArguments((path,), plots=path))


def test_what_a_run_says_of_itself() -> None:
    described = describe_run("ops", CpuDevice("A Processor"), malloc="kept")
    assert described.hardware.startswith("A Processor, ") and described.settings["malloc"] == "kept"
    assert {"python", "torch", "threads"} < set(described.settings) and not described.complete
    gpu = describe_run("node", FakeGpu("H100"), num_gpus=8, threads="8 ranks of 1")
    assert gpu.hardware == "8 x fake H100" and gpu.settings["threads"] == "8 ranks of 1"


def test_plots_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    path = saved(tmp_path, "a.json", case("a", 2.0))
    with pytest.raises(InputError, match="pip install"):
        run_report(ReportArguments((path,), plots=tmp_path / "plots"))
