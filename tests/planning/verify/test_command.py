"""Start here when `fused-megatron verify` returns a wrong exit code or table, or a traceback on bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from fused_megatron import cli
from fused_megatron.checks import InputError
from fused_megatron.config import TrainConfig
from fused_megatron.planning.verify.command import run_verify
from fused_megatron.planning.verify.layout_run import run_layout
from fused_megatron.testing.planted_faults import fault
from fused_megatron.testing.run_on_ranks import run_on_ranks


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "dp.toml"
    path.write_text("""
        [model]
        num_layers = 2
        hidden_size = 32
        num_heads = 4
        [parallel]
        data_parallel_size = 2
        [data]
        path = "/nowhere/at/all"
        [training]
        global_batch_size = 8
        microbatch_size = 2
    """)
    return path


def planted(rank: int, world_size: int, each: TrainConfig) -> Any:
    with fault("last bucket not sent").plant():
        return run_layout(rank, world_size, each)


def test_a_right_layout_ends_with_0_and_a_wrong_one_with_1(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(config), "--against", "one"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.splitlines()[-1] == "SAME"
    assert f"{config}, reduced: num_layers 2 -> 2" in shown.out and "dp 2, microbatches: 2 ranks" in shown.out
    for row in ("weights at the start", "outputs of modules", "loss ", "gradients", "gradient norm", "weights after"):
        assert f"\n  {row}" in shown.out

    words = [str(config), "--json", "--all", "--against=one"]
    assert run_verify(words, lambda each: run_on_ranks(planted, each.parallel.num_ranks, each)) == 1
    document = json.loads(capsys.readouterr().out)
    (layout,) = document["layouts"]
    assert document["ok"] is False and layout["ok"] is False
    assert layout["likely_axis"] == "data parallel; by itself right: microbatches"
    assert layout["first"]["kind"] == "gradient" and layout["first"]["ranks"].keys() == {"0", "1"}
    assert {row["kind"] for row in layout["rows"]} == {"start", "output", "loss", "gradient", "norm", "weight"}


def test_a_planted_fault_is_an_exercise(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verify(["--plant", "list"]) == 0
    listed = capsys.readouterr().out
    assert "last_bucket_not_sent" in listed and "data parallel" in listed
    assert run_verify(["--plant=last-bucket-not-sent", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "DIFFERENT, first in order of computation: gradient of" in shown
    assert "planted: last_bucket_not_sent (" in shown and shown.endswith("its axis, data parallel\n")
    # A layout without tensor parallelism does not show a fault of tensor parallelism.
    assert run_verify(["--plant", "embedding_not_summed", str(config)]) == 1
    assert "NOT FOUND: this layout does not show it" in capsys.readouterr().out
    for words, message in (
        (["--plant", "nothing"], r"plant='nothing' must be one of \d+ names \(nearest: "),
        (["--plant"], "plant='' must be one of"),
        (["--plant", "bias_on_every_rank", str(config)], "plant=bias_on_every_rank is a fault of a module: leave"),
        (["--plant", "embedding_not_summed", "--all"], "--all does not go with --plant"),
    ):
        with pytest.raises(InputError, match=message):
            run_verify(words)


def test_bad_input_is_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*words: object) -> str:
        assert cli.main(["verify", *map(str, words)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("fused-megatron: error: ")
        return lines[0]

    assert "verify needs a config file first" in said("--all")
    assert "nowhere.toml does not exist" in said(tmp_path / "nowhere.toml")
    assert "--against='two' must be 'one'" in said(config, "--against", "two")
    assert "--against='' must be 'one'" in said(config, "--against")
    assert "--all=3 must be --all: it takes no value" in said(config, "--all=3")
    assert "unknown option --model.num_layer (did you mean --model.num-layers?)" in said(config, "--model.num_layer", 3)
    assert "must be divisible by num_heads=3" in said(config, "--model.num-heads", 3)
    assert "changes the update rule" in said(config, "--parallel.schedule", "pipedream")
    assert "data_parallel_size=3" in said(config, "--parallel.data-parallel-size", 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "verify starts its own ranks: run it once, without torchrun" in said(config)


def test_help_names_the_options_and_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("--all", "--dtype", "--json", "--against", "docs/verify.md", "--parallel.tensor-parallel-size"):
        assert word in shown
