"""Start here when `fused-megatron dry-run` prints other numbers than its dry run, or reports bad input badly."""

import json
from pathlib import Path

import pytest
import torch

from fused_megatron import cli
from fused_megatron.planning.dry_run import DryRun
from fused_megatron.planning.dry_run_command import parse_options, run_dry_run

TINY = """
[model]
num_layers = 4
hidden_size = 32
num_heads = 4
seq_len = 16
vocab_size = 101
[parallel]
tensor_parallel_size = 2
pipeline_parallel_size = 2
[training]
global_batch_size = 8
microbatch_size = 2
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return str(path)


def test_json_and_tables_say_what_was_found(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [config, "--ranks", "8", "--rank=6", "--training.dtype", "bfloat16"]
    report = DryRun(parse_options(words).config).rank(6)
    assert run_dry_run([*words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["ranks"]
    assert (found["peak_bytes"], found["flops"]) == (report.peak_bytes, report.flops)
    assert found["groups"] == {"tp": [6, 7], "pp": [2, 6], "dp": [4, 6]}
    assert sum(found["peak_by_kind"].values()) == found["peak_bytes"]
    assert {"kind": "send", "axis": "pp", "calls": 2, "bytes": 2 * 2 * 16 * 2 * 32 // 2} in found["transfers"]
    assert run_dry_run(words) == 0
    text = capsys.readouterr().out
    assert "in bfloat16 on 8 ranks (tp=2 pp=2 1f1b dp=2)" in text and f"{report.num_parameters:,}" in text
    assert report.at is not None and f"{report.at[0]}: {report.at[1]}" in text


def test_a_config_without_a_vocabulary_gets_its_tokenizers(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [config, "--model.vocab-size", "none", "--data.tokenizer-vocab-size", "600", "--ranks", "4"]
    assert parse_options(words).config.model.vocab_size == 600
    assert run_dry_run(words) == 0
    assert "Chosen: a vocabulary of 600 entries, as data.tokenizer_vocab_size" in capsys.readouterr().out
    assert run_dry_run([config, "--ranks", "4"]) == 0
    assert "Chosen" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "8"], "dry-run needs a config file first"),
        (["CONFIG", "--ranks"], "--ranks needs a value"),
        (["CONFIG", "--rank", "x"], "--rank='x' must be a whole number"),
        (["CONFIG", "--ranks", "6"], "ranks=6 must be divisible by tensor_parallel_size x pipeline_parallel_size=4"),
        (["CONFIG", "--rank", "4"], "rank=4 must be in [0, 4), the ranks of the layout"),
        (["CONFIG", "--json=1"], "--json=1 must be --json: it takes no value"),
        (["CONFIG", "--device", "tpu"], "device='tpu' must be one of: 'cpu', 'cuda'"),
        pytest.param(
            ["CONFIG", "--device", "cuda"],
            "device='cuda' needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["CONFIG", "--ranks", "32"], "global_batch_size=8 must be divisible by"),
        (["CONFIG", "--model.vocabsize", "7"], "unknown option --model.vocabsize"),
    ],
)
def test_bad_input(words: list[str], message: str, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dry-run", *(config if word == "CONFIG" else word for word in words)]) == 2
    assert message in capsys.readouterr().err
