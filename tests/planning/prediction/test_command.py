"""Start here when `fused-megatron predict` prints something else than the prediction, or takes bad input badly."""

import json
from pathlib import Path

import pytest

from fused_megatron.cli import main
from fused_megatron.config.config_file import load_config
from fused_megatron.planning.command_line import on_ranks
from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.prediction.step_time import predict_step

ROOT = Path(__file__).parents[3]
PRESET = str(ROOT / "benchmarks/presets/llama_70b_tp8_pp2_dp4_zero1.toml")
TINY = str(ROOT / "examples/gpt_tiny.toml")
VOCABULARY = ("--model.vocab-size", "8192", "--training.global-batch-size", "64")


def test_prediction_as_text_and_json(capsys, tmp_path):
    words = ["predict", PRESET, "--cluster", "h100", "--tokens", "1T", "--price", "2.5"]
    assert main(words) == 0
    text = capsys.readouterr().out
    for part in (
        "GPT in bfloat16 on 64 h100-80gb",
        "tokens/s",
        "MFU",
        "GB of 80 GB",
        "allocator",
        "days, cost",
        "pipeline bubble",
        "Outside",
    ):
        assert part in text
    assert main([*words, "--json", "--trace", str(tmp_path / "trace.json")]) == 0
    facts = json.loads(capsys.readouterr().out)
    expected = predict_step(load_config(Path(PRESET)), load_cluster("h100"))
    assert facts["step_s"] == pytest.approx(expected.seconds)
    assert facts["low_s"] < facts["step_s"] < facts["high_s"]
    days = 1e12 / (1024 * 4096) * facts["step_s"] / 86400
    assert facts["days"] == pytest.approx(days)
    assert facts["cost"] == pytest.approx(2.5 * 64 * 24 * days)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_ranks_choose_the_data_parallel_size(capsys):
    assert main(["predict", TINY, *VOCABULARY, "--cluster=a100", "--ranks", "8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    config = on_ranks(load_config(Path(TINY), VOCABULARY), 8)
    assert facts["gpus"] == 8
    assert facts["step_s"] == pytest.approx(predict_step(config, load_cluster("a100")).seconds)


def test_a_model_that_does_not_fit_is_said(capsys):
    words = ["--parallel.tensor-parallel-size=1", "--parallel.pipeline-parallel-size=1"]
    assert main(["predict", PRESET, "--cluster", "h100", *words, "--parallel.sequence-parallel=False"]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_validation_prints_errors_and_rows(capsys):
    path = ROOT / "benchmarks/published/tutorial_experiments.csv"
    words = ["predict", "--validate", str(path), "--cluster", "h100"]
    assert main([*words, "--rows"]) == 0
    text = capsys.readouterr().out
    assert "held out" in text
    assert "tbl502-R8" in text
    assert main([*words, "--json"]) == 0
    errors = json.loads(capsys.readouterr().out)["errors"]
    assert errors["fitted"]["number"] + errors["held out"]["number"] == 36


def test_a_config_without_a_vocabulary_and_a_model_that_does_not_fit(capsys):
    assert main(["predict", TINY, "--cluster", "a100", "--model.hidden-size", "131072"]) == 0
    text = capsys.readouterr().out
    assert "Chosen: a vocabulary of 8,192 entries" in text
    assert "GB too much (fused-megatron plan finds a layout)" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([TINY], "predict needs --cluster"),
        (["--cluster", "a100"], "predict needs a config file"),
        ([TINY, "--cluster", "v100"], "cluster='v100' must be one of"),
        ([TINY, *VOCABULARY, "--cluster", "a100", "--ranks", "0"], "ranks=0 must be 1 or more"),
        ([TINY, *VOCABULARY, "--cluster", "a100", "--ranks", "3"], "ranks=3 must be divisible"),
        ([TINY, *VOCABULARY, "--cluster", "a100", "--tokens", "100Q"], "tokens='100Q'"),
        ([TINY, *VOCABULARY, "--cluster", "a100", "--price", "cheap"], "price='cheap' must be a number above 0"),
        ([TINY, *VOCABULARY, "--cluster", "a100", "--price", "0"], "price='0' must be a number above 0"),
        ([TINY, *VOCABULARY, "--cluster", "a100", "--engine", "apex"], "engine='apex' must be one of"),
        (["--validate", TINY, "--cluster", "a100"], "must be a CSV file"),
        (["--validate", "none.csv", "--cluster", "a100"], "does not exist"),
        ([TINY, "--validate", "none.csv", "--cluster", "a100"], "does not go with --validate"),
        ([TINY, "--cluster"], "--cluster needs a value"),
    ],
)
def test_bad_input_is_one_line(capsys, words, message):
    assert main(["predict", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
