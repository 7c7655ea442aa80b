"""Start here when `make bench-end-to-end` or `make bench-layers` fails, or loses what it measured."""

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_megatron.benchmarking.report.results_file import read_results
from fused_megatron.benchmarking.side_by_side import Bars, Comparison
from fused_megatron.observe.model_flops import gpt_step_flops

ROOT = Path(__file__).parents[1]


def start(name: str, *options: object, path: Path | None = None) -> subprocess.Popen[str]:
    found = os.pathsep.join(map(str, filter(None, [path, ROOT])))
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--quick", *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": found, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def run(name: str, *options: object, path: Path | None = None) -> tuple[int, str]:
    process = start(name, *options, path=path)
    output, _ = process.communicate(timeout=600)
    assert "Traceback" not in output, output
    return process.returncode, output


# Broken libraries: one ends its process and then fails, one computes something else.
_MEGATRON = """
import os, pathlib
marker = pathlib.Path(__file__).parent / "died"
if not marker.exists():
    marker.touch()
    os._exit(3)
raise RuntimeError("made to fail\\nin two lines")
"""
_TRANSFORMERS = """
import types, torch
GPT2Config = dict
class GPT2LMHeadModel(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = torch.nn.ModuleDict({"wte": torch.nn.Embedding(config["vocab_size"], config["n_embd"])})
    def forward(self, tokens):
        x = self.transformer["wte"](tokens)
        return types.SimpleNamespace(logits=x @ self.transformer["wte"].weight.t())
"""


LAYOUTS = ("tp=2", "tp=2 + sp", "pp=2 interleaved_1f1b m=8", "dp=2 m=2", "one process")


@pytest.mark.parametrize(
    "layouts", [(LAYOUTS[4],), pytest.param(LAYOUTS, marks=pytest.mark.slow)], ids=["one process", "all"]
)
def test_layouts_beside_torch(layouts, tmp_path):
    """Ours and torch's layouts train as plain torch does, and the file has tokens, FLOPs, ranks and parts of the time.

    A provider that fails, one with a wrong result and one that ends its process get one line each, the others figures.
    """
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text(_MEGATRON)
    (tmp_path / "transformers.py").write_text(_TRANSFORMERS)
    results = tmp_path / "results.json"
    code, output = run("end_to_end.py", "--layouts", *layouts, "--results", results, path=tmp_path)
    assert code == 0, output
    found = read_results(results)
    assert found.complete and found.theme == "end_to_end"
    by_label = {c.label: c for c in found.comparisons}
    limits = [f"{layout}, against products and attention" for layout in layouts if layout[:2] in ("tp", "on")]
    assert {*by_label} == {*layouts, "one process, against plain torch", *limits}
    for limit in limits:
        assert set(by_label[limit].seconds) == {"ours", "products and attention alone", "bound"}
        assert by_label[limit].bars == Bars(bound=1.08 if limit.startswith("one") else 1.2)
    wrong = by_label["one process"].faults["Hugging Face GPT-2"]
    assert (
        re.fullmatch(r"wrong: losses [\d. ]+, not [\d. ]+; not timed", wrong)
        and f"\nHugging Face GPT-2: {wrong}" in output
    )
    for comparison in found.comparisons:
        assert all(len(seconds) == 2 for seconds in comparison.seconds.values())
        assert set(comparison.peak_bytes) == set(comparison.breakdown) == set(comparison.seconds)
        # The limit has no optimizer, and its copies count as computation.
        parts = {"compute", "optimizer"} | ({"communication"} if comparison.ranks == 2 else set())
        assert set(comparison.breakdown["ours"]) == parts | ({"bubble"} if "pp" in comparison.label else set())
        assert min(min(parts.values()) for parts in comparison.breakdown.values()) >= 0
        assert comparison.tokens and comparison.hardware_flops == comparison.model_flops > 0
    if layouts != LAYOUTS:
        return
    assert found.ceilings["gemm_gflop_per_s float32, 2 ranks"] > 0
    assert re.fullmatch(r"failed: rank \d died with exit code 3", by_label["tp=2"].faults["megatron-core"])
    assert by_label["tp=2 + sp"].faults == {"megatron-core": "failed: RuntimeError: made to fail"}
    assert set(by_label["tp=2"].seconds) == {"ours", "DTensor", "DTensor, loss_parallel"}
    assert set(by_label["dp=2 m=2"].seconds) == {"ours", "DDP", "FSDP2", "FSDP2, gathered once a step"}
    pipeline = by_label["pp=2 interleaved_1f1b m=8"]
    assert pipeline.tokens == 8 * 16 and pipeline.breakdown["ours"]["bubble"] > 0
    assert {name.rpartition(" ")[2] for name in pipeline.seconds} >= {"1+1+1+1", "1+2+1+0"}


def test_products_and_attention_alone(monkeypatch):
    """The recorded calls are all products of a step, forward and backward, and the other ops' bytes have its sizes."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpt_layouts, alone = (importlib.import_module(name) for name in ("gpt_layouts", "products_alone"))
    size, layout = gpt_layouts.SIZES["tiny"], gpt_layouts.Layout()
    recorded = alone.recorded_calls(size, layout, gpt_layouts.full_weights(size))
    # Four linear layers a block and the head, each with two products in backward; attention forward and backward.
    assert len(recorded.calls) == 3 * (4 * size.num_layers + 1) + 2 * size.num_layers
    tokens = size.num_sequences * size.seq_len
    # torch counts 5 products in an attention's backward, since it computes the scores again.
    scores_again = 2 * size.num_layers * tokens * size.seq_len * size.hidden_size
    assert recorded.flops == gpt_step_flops(size.config, tokens)[1] + scores_again
    parameters = sum(weight.numel() for weight in gpt_layouts.full_weights(size).values())
    optimizer = parameters * 4 * (3 * 2 + 1)
    activations = size.num_layers * 4 * tokens * size.hidden_size * 4
    assert optimizer + 10 * activations < recorded.other_bytes < optimizer + 40 * activations
    with torch.no_grad():
        first, again = (recorded.calls[0]() for _ in range(2))
    assert torch.equal(first, again) and first.abs().sum() > 0


@pytest.mark.slow
def test_two_kinds_of_parallelism_at_once(tmp_path):
    results = tmp_path / "results.json"
    code, output = run("end_to_end.py", "--ranks", 4, "--results", results)
    assert code == 0, output
    pipeline, data = read_results(results).comparisons
    assert (pipeline.label, data.label) == ("tp=2 x pp=2 1f1b m=8", "tp=2 x dp=2 m=2")
    assert set(pipeline.seconds) == {"ours", "torch.distributed.pipelining + DTensor, blocks 2+2"}
    assert set(data.seconds) == {"ours", "FSDP2 + DTensor", "FSDP2 + DTensor, gathered once a step"}


@pytest.mark.slow
def test_layers_beside_dtensor(tmp_path):
    results = tmp_path / "results.json"
    code, output = run("layers.py", "--only", "tp + sp", "--results", results)
    assert code == 0, output
    found = read_results(results)
    assert found.complete and found.theme == "layers"
    assert all(set(c.seconds) == {"ours", "DTensor"} and not c.faults for c in found.comparisons)
    assert [c.op for c in found.comparisons[::2]] == ["MLP forward + backward", "attention forward + backward"]
    assert found.comparisons[1].label == "[16, 2, 32] tp=2 + sp, overlap off"
    assert found.comparisons[0].model_flops == 3 * 32 * 16 * 32**2


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    """In the middle of a layout; earlier content of the file stays."""
    results = tmp_path / "results.json"
    process = start("end_to_end.py", "--rounds", 100000, "--layouts", "tp=2", "--results", results)
    assert process.stdout is not None
    try:
        next(line for line in process.stdout if line.startswith("  100000 rounds of "))
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 1 and "Traceback" not in output, output
    (kept,) = read_results(results).comparisons
    assert kept.seconds["ours"] and not read_results(results).complete
    assert re.search(r"^interrupted: what was measured is kept in ", output, re.MULTILINE)


def test_a_file_is_added_to(monkeypatch, tmp_path):
    """But only by runs of the same machine."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import run_of_layouts as runs  # noqa: PLC0415 - beside the benchmark's modules

    options = runs.parser_of(None).parse_args(["--add-to", str(tmp_path / "some.json")])
    results, path = runs.begin("layers", options, False)
    first, again, other = (Comparison("MLP", label, "float32", None, Bars()) for label in ("tp=2", "tp=2", "tp=4"))
    first.seconds, again.seconds, other.seconds = ({"ours": [s], "DTensor": [1.0]} for s in (1.0, 2.0, 3.0))
    assert runs.keep(results, path, [first], True)
    results, path = runs.begin("layers", options, False)
    assert runs.keep(results, path, [again, other], True)
    assert [c.seconds["ours"] for c in read_results(path).comparisons] == [[2.0], [3.0]]
    with pytest.raises(SystemExit, match="is of another theme: 'layers', not 'end_to_end'"):
        runs.begin("end_to_end", options, False)
    path.write_text(path.read_text().replace(torch.__version__, "2.0"))
    with pytest.raises(SystemExit, match="was measured otherwise: torch"):
        runs.begin("layers", options, False)


def test_flops_are_those_that_torch_counts(monkeypatch):
    """For the same model as the others train, with attention as plain matrix products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: PLC0415 - beside the benchmark's modules
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpt_layouts  # noqa: PLC0415
    import gpt_of_torch  # noqa: PLC0415

    size, layout = gpt_layouts.SIZES["tiny"], gpt_layouts.Layout()
    tokens, target = gpt_layouts.batch_of(size, layout)
    step = gpt_of_torch.plain_step(size, layout, gpt_layouts.full_weights(size))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step.run(tokens, target)
    assert gpt_step_flops(size.config, tokens.numel())[0] == counter.get_total_flops()
