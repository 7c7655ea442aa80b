"""Start here when `fused-megatron evaluate` finds another loss than training did, or at another layout."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from fused_megatron import cli
from fused_megatron.config.config_file import save_config
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.training.evaluate_run import evaluate_run, parse_options
from fused_megatron.training.train import train

LAYOUTS = {
    "of the run": (),
    "dp": ("--parallel.tensor-parallel-size=1",),
    "zero 3": ("--parallel.tensor-parallel-size=1", "--parallel.zero-stage=3"),
    "pp": ("--parallel.tensor-parallel-size=1", "--parallel.pipeline-parallel-size=2"),
    "cp": ("--parallel.tensor-parallel-size=1", "--parallel.context-parallel-size=2"),
}


@pytest.fixture(scope="module")
def run(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Train a run whose last validation covers all held-out text; return its folder and that record."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    records = runs.trained(folder, tensor_parallel_size=2, eval_batches=1000, num_steps=2)
    return folder, next(record for record in reversed(records) if "validation_loss" in record)


def on_two_ranks(rank: int, world_size: int, folder: str) -> dict[str, tuple[float, int]]:
    found = {}
    for name, words in LAYOUTS.items():
        result = evaluate_run(parse_options([folder, "--json", *words]))
        found[name] = result.validation_loss, result.validation_tokens
    return found


def test_every_layout_finds_the_loss_of_the_run(run: tuple[Path, dict[str, Any]], capsys: Any) -> None:
    folder, record = run
    for found in run_on_ranks(on_two_ranks, 2, str(folder), timeout_s=300):
        for name, (loss, tokens) in found.items():
            assert tokens == record["validation_tokens"], name
            assert loss == pytest.approx(record["validation_loss"], rel=1e-5), name
    # One process cannot have the layout of the run, and takes its own.
    assert cli.main(["evaluate", str(folder), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["loss"] == pytest.approx(record["validation_loss"], rel=1e-5)
    assert alone["bits_per_byte"] == pytest.approx(record["bits_per_byte"], rel=1e-5)
    assert alone["perplexity"] == pytest.approx(math.exp(alone["loss"]))
    assert alone["checkpoint"].endswith("step-000002")


def test_another_text_is_evaluated_whole_and_by_the_tokenizer_of_the_run(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    (tmp_path / "small.txt").write_text("a short text")  # too short for a sample of training
    # As if the run had been trained on two texts with weights.
    config = folder / "config.toml"
    path = json.dumps(str(Path(folder.parent) / "text"))
    blend = re.sub(r"(?m)^path = .*$", f"path = [{path}, {path}]\nweights = [0.9, 0.1]", config.read_text())
    kept = config.read_text()
    words = ["evaluate", str(folder), "--data.path", str(tmp_path / "small.txt")]
    config.write_text(blend)
    assert cli.main(words) == 0
    config.write_text(kept)
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "bits per byte" in shown and "small.txt" in shown
    lines = [f"line {i} of the other text" for i in range(50)]
    (tmp_path / "other.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    found = {}
    for name, more in (("all", []), ("held-out", ["--part", "held-out"]), ("few", ["--max-samples", "2"])):
        assert cli.main([*words[:3], str(tmp_path / "other.jsonl"), "--json", *more]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    from fused_megatron.data.tokenizer import load_tokenizer  # noqa: PLC0415 (needs the package tokenizers)

    tokenizer = load_tokenizer(folder / "tokenizer.json")
    # Two datasets, of which only the first token is no target.
    assert found["all"]["tokens"] == sum(len(tokenizer.encode(line)) + 1 for line in lines) - 2
    assert 0 < found["held-out"]["tokens"] < found["all"]["tokens"] / 10 and 0 < found["few"]["tokens"] <= 2 * 26


@pytest.mark.slow
def test_a_bert_is_evaluated_on_masked_tokens(runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = runs.config(tmp_path / "run", family="bert", eval_batches=1000, num_steps=2)
    save_config(config, tmp_path / "bert.toml")
    train(config, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(record["validation_loss"], rel=1e-6) and found["bits_per_byte"] is None


def test_refusals(run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([], "evaluate needs a run folder first"),
        ([tmp_path], "is no run folder: it has no config.toml"),
        ([run[0], "--part", "some"], "--part=some must be all or held-out"),
        ([run[0], "--max-samples", "0"], "--max-samples=0 must be 1 or more"),
        ([run[0], "--model.num-heads", "3"], "hidden_size=32 must be divisible by num_heads=3"),
        ([run[0], "--parallel.tensor-parallel-size", "2"], "must equal the world size 1"),
    ):
        assert cli.main(["evaluate", *map(str, words)]) == 2
        assert message in capsys.readouterr().err
