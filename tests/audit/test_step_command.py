"""Start here when docs/gpu_step.md is stale, or a training step has more kernels, waits or collectives than before."""

import dataclasses
from pathlib import Path

import pytest

from fused_megatron import cli
from fused_megatron.audit.step_command import HOST_SYNCS, TOTAL, marks, parsed, report, table
from fused_megatron.config.config_file import load_config
from fused_megatron.observe.kernel_counts import KINDS
from fused_megatron.planning.step_budget import Budget, LayerBudget, StepBudget, layer_budget

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gpu_step.md"
PRESETS = ["gpt_7b_tp2", "llama_70b_tp8_pp2_dp4_zero1", "gpt_175b_tp8_pp16_dp8_zero1"]
NOTHING = Budget({}, {}, {}, 0)
AGAIN = "fused-megatron audit --step benchmarks/presets/{}.toml --write docs/gpu_step.md"


def preset(name, *overrides):
    return load_config(ROOT / "benchmarks" / "presets" / f"{name}.toml", overrides)


def on_the_page(name):
    begin, end = marks(name)
    return PAGE.read_text().partition(begin)[2].partition(end)[0]


def grown(known, now, columns):
    """Return the larger counts of these columns, of all kinds of kernels together, since work moves between the kinds.

    The page is written with whole MB.
    """
    return [
        f"{column}: {row} {known.get(row, {}).get(column, 0)} -> {cells[column]}"
        for row, cells in now.items()
        for column in columns
        if not any(row.startswith(kind) for kind in KINDS) and cells[column] > known.get(row, {}).get(column, 0)
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_no_count_of_a_layer_has_grown(name):
    known, now = (
        parsed(on_the_page(name)),
        parsed(table(layer_budget(preset(name)), StepBudget(NOTHING, NOTHING, 1, 1))),
    )
    assert known[TOTAL]["layer, forward"] > 0
    assert grown(known, now, ["layer, forward", "layer, backward", "ends"]) == [], AGAIN.format(name)
    assert now[HOST_SYNCS]["layer, forward"] == now[HOST_SYNCS]["layer, backward"] == now[HOST_SYNCS]["ends"] == 0
    assert known[HOST_SYNCS]["step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_the_page_is_up_to_date(name):
    assert on_the_page(name) == report(preset(name)), AGAIN.format(name)


def test_a_grown_count_is_found():
    some = Budget({"norms": 2, "other": 1}, {"norms": 3_000_000, "other": 0}, {"all_reduce": 2}, 0)
    more = Budget({"norms": 3}, {"norms": 4_000_000}, {"all_gather": 3}, 1)
    step = StepBudget(NOTHING, NOTHING, 1, 1)
    known, now = (table(LayerBudget(part, NOTHING, some), step) for part in (some, more))
    assert "| norms | 2 / 3 | 0 | 2 / 3 | 0 | 0 |" in known
    found = grown(parsed(known), parsed(now), ["layer, forward", "ends"])
    assert found == [
        "layer, forward: all kernels, MB 3 -> 4",
        "layer, forward: host waits 0 -> 1",
        "layer, forward: all_gather 0 -> 3",
    ]
    less = table(LayerBudget(dataclasses.replace(more, launches={"norms": 4}), NOTHING, some), step)
    assert grown(parsed(known), parsed(less), ["layer, forward"])[0] == "layer, forward: all kernels 3 -> 4"
    assert grown(parsed(known), parsed(known), ["layer, forward"]) == []


def test_command(capsys, tmp_path):
    config, page = tmp_path / "small.toml", tmp_path / "page.md"
    config.write_text(
        "[model]\nnum_layers = 2\nhidden_size = 32\nnum_heads = 4\nseq_len = 16\nvocab_size = 100\n"
        "[training]\nglobal_batch_size = 2\nmicrobatch_size = 1\ndtype = 'bfloat16'\n"
    )
    begin, end = marks("small")
    page.write_text(f"# Title\n{begin}old\n{end}\nrest\n")
    words = ["audit", "--step", str(config), "--write", str(page), "--model.num_layers", "1"]
    assert cli.main(words) == 0 == cli.main(words)  # the second call replaces the table of the first
    text = page.read_text()
    assert text.startswith(f"# Title\n{begin}tp=1 pp=1 dp=1; 1 layers on the first rank; a step of 2 microbatches")
    assert text.endswith(f"|\n{end}\nrest\n") and "old" not in text and parsed(text)["norms"]["layer, forward"] == 2
    capsys.readouterr()
    page.write_text("no marks\n")
    assert cli.main(words) == 2
    assert "must have the lines <!-- small: begin --> and" in capsys.readouterr().err
    assert cli.main(["audit", "--step", str(config), "--ops"]) == 2
    assert cli.main(["audit", "--step", "--help"]) == 0
    assert "--write PAGE.md" in capsys.readouterr().out
