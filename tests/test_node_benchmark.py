"""Start here when `make bench-node` fails under torchrun, or leaves something behind."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fused_megatron.benchmarking.report.results_file import read_results
from fused_megatron.benchmarking.timing_devices import FakeGpu
from fused_megatron.checks import InputError
from fused_megatron.cli import main
from fused_megatron.config import TrainConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.observe.model_flops import gpt_step_flops
from fused_megatron.planning.rank_memory import rank_memory

ROOT = Path(__file__).parents[1]
SMALL = """
[model]
num_layers = 2
hidden_size = {hidden_size}
num_heads = 4
seq_len = 16
vocab_size = 100
pad_vocab_size_to_multiple_of = 2
[parallel]
{parallel}
[training]
global_batch_size = 4
microbatch_size = 2
"""
# Code that changes a run from inside its processes.
SCRIPT = """
import os, signal, sys
os.environ.setdefault("LAUNCHER", str(os.getpid()))  # of the first process, which starts torchrun
sys.path.insert(0, {benchmarks!r})
import node, node_steps, torch
step = node_steps.Trainer.train_step
def train_step(self):
    hidden_size, stop = self.config.model.hidden_size, self.progress.step == 2
    if hidden_size == 64 and stop and self.mesh.rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nand much more")
    if hidden_size == 96 and stop and self.mesh.rank == 0:
        os.kill(int(os.environ["LAUNCHER"]), signal.SIGINT)
    return step(self)
node_steps.Trainer.train_step = train_step
node.main()
"""


# The script recognises each run by its hidden size; runs with smaller sizes come first.
HIDDEN_SIZES = {"out_of_memory": 64, "stop": 96, "later": 128}
PARALLEL = {
    "one": "",
    "sequence": "tensor_parallel_size = 2\nsequence_parallel = true",
    "pipeline": "pipeline_parallel_size = 2",
    "replicas": "data_parallel_size = 2",
    "out_of_memory": "tensor_parallel_size = 2",
    "stop": "tensor_parallel_size = 2",
    "later": "data_parallel_size = 2",
    "four": "tensor_parallel_size = 4",
}


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("node")


MEASURED = ("one", "sequence", "pipeline", "replicas")


@pytest.mark.slow  # torchrun is started anew for each fault; test_a_whole_run stays in the fast part
def test_figures_faults_and_ctrl_c(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, parallel in PARALLEL.items():
        text = SMALL.format(hidden_size=HIDDEN_SIZES.get(name, 32), parallel=parallel)
        (tmp_path / f"{name}.toml").write_text(text)
    (tmp_path / "script.py").write_text(SCRIPT.format(benchmarks=str(ROOT / "benchmarks")))
    command = [sys.executable, "script.py", "--ranks", "2", "--quick", "--steps", "3", "--results", "node.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--presets", *(f"{name}.toml" for name in PARALLEL)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert "no GPU here: gloo" in done.stdout, done.stderr
    out_of_memory = "rank 1: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)"
    assert f"out_of_memory: {out_of_memory}" in done.stdout
    # Measurements from before Ctrl-C are kept.
    assert f"interrupted: {len(MEASURED) + 1} of {len(PARALLEL)} presets are in node.json" in done.stdout
    assert done.returncode == 130 and "Traceback" not in done.stdout + done.stderr
    path = tmp_path / "node.json"
    results = read_results(path)
    assert not results.complete and results.theme == "node" and results.ceilings["gemm_gflop_per_s float32"] > 0
    found = {comparison.op.removeprefix("GPT "): comparison for comparison in results.comparisons}
    assert set(found) == {*MEASURED, "out_of_memory"}
    assert found["out_of_memory"].faults == {"ours": out_of_memory}
    for name in MEASURED:
        comparison = found[name]
        assert len(comparison.seconds["ours"]) == 3 and not comparison.faults, name
        assert comparison.ranks == (1 if name == "one" else 2) and comparison.tokens == 4 * 16
        assert comparison.peak_bytes["ours"] > 16 * 32 * 32 and comparison.model_flops == comparison.hardware_flops
        parts = comparison.breakdown["ours"]
        waits = {"one": set(), "pipeline": {"communication", "bubble"}}.get(name, {"communication"})
        assert set(parts) == {"compute", "optimizer", *waits}, name
        assert all(s > 0 for s in parts.values())
        assert sum(parts.values()) < 2 * max(comparison.seconds["ours"]), name
    assert main(["report", str(path)]) == 0
    assert "tp=2 + sp" in capsys.readouterr().out


def test_a_whole_run(
    node: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Output and file of rank 0, for steps of 1 s on one rank and 1.25 s on two, with GPUs of 100 TFLOP/s."""
    presets = node.load_presets(["gpt_1.2b_tp1", "gpt_2.5b_tp2", "gpt_8.3b_tp8"], tiny=False)
    flops = [gpt_step_flops(preset.config.model, 8 * 1024) for preset in presets]

    def measure(config: TrainConfig, device: object, **_: int) -> object:
        seconds = {1: 1.0, 2: 1.25}[config.parallel.tensor_parallel_size]
        return node.Measured([seconds] * 3, {"compute": 0.75, "communication": 0.25}, 20_000_000_000, [10.0])

    monkeypatch.setattr(node, "measure", measure)
    monkeypatch.setattr(node, "measure_ceilings", lambda *_, **__: {"gemm_gflop_per_s bfloat16": 1e5})
    monkeypatch.setattr(node, "device_bytes", lambda *_: 80 << 30)
    ranks = SimpleNamespace(rank=0, world_size=2, resumed=False, run=lambda task, num_ranks, function: (function(), ""))
    path = tmp_path / "node.json"
    results = node.run(ranks, FakeGpu("H100"), presets, node.parse(["--results", str(path)]))
    assert read_results(path) == results and results.complete and results.hardware == "2 x fake H100"
    assert [c.faults for c in results.comparisons] == [{}, {}, {"ours": "needs 8 ranks (tp=8); 2 are here"}]
    assert "39 TFLOP/s on one V100" in results.comparisons[0].notes["published"]
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")] for line in said.splitlines() if line.startswith("| GPT ")][1:]
    assert len(rows) == 2
    expected = [("1.2B", 1, 1.0), ("2.5B", 2, 1.25)]
    for row, (model, hardware), (op, ranks_of, seconds) in zip(rows, flops[:2], expected, strict=True):
        tflops = model / seconds / ranks_of / 1e12
        scaling, ms = tflops / (flops[0][0] / 1e12), f"{1e3 * seconds:,.1f}"
        assert row[1:-1] == [
            f"GPT {op} tp={ranks_of}", str(ranks_of), f"{ms} [{ms}-{ms}]",
            f"{8192 / seconds:,.0f}", f"{tflops:.3g}", f"{tflops:.0f} %", f"{tflops * hardware / model:.0f} %",
            f"{100 * scaling:.0f} %", "20.00", "compute 75 %, communication 25 %",
        ]  # fmt: skip
    assert "GPT 1.2B tp=1: published 39 TFLOP/s on one V100" in said


def test_what_cannot_run_is_one_line(node: ModuleType) -> None:
    with pytest.raises(InputError, match=r"preset='gpt_9b' is no file and none of: gpt_1.2b_tp1, "):
        node.load_presets(["gpt_9b"], tiny=True)
    (preset,) = node.load_presets(["gpt_8.3b_tp8"], tiny=False)
    assert node.refusal(preset, 8, 80 << 30) is None
    assert node.refusal(preset, 4, 80 << 30) == "needs 8 ranks (tp=8); 4 are here"
    assert node.refusal(preset, 8, 16 << 30) == "needs 22.8 GB on a rank, which has 17.2 GB (14.2 for training)"


def test_tiny_models_keep_the_layout(node: ModuleType) -> None:
    presets = node.load_presets([], tiny=True)
    assert [p.num_ranks for p in presets] == [1, 2, 4, 8, 8, 8]
    for preset in presets:
        real = load_config(ROOT / "benchmarks" / "presets" / f"{preset.name}.toml")
        assert preset.config.parallel == real.parallel and preset.config.model.recompute == real.model.recompute
        assert rank_memory(preset.config).total < 100e6
