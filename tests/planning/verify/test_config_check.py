"""Start here when `fused-megatron verify` calls a right layout wrong, or hangs after a rank has failed."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_megatron.config import DataConfig, GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.planning.verify.config_check import verify_config
from fused_megatron.planning.verify.layout_run import batch_of, run_layout
from fused_megatron.planning.verify.reduced_config import axes_in_use, reduce_config
from fused_megatron.testing.run_on_ranks import run_on_ranks

ROOT = Path(__file__).parents[3]
FILES = sorted([*(ROOT / "benchmarks" / "presets").glob("*.toml"), *(ROOT / "examples").glob("*.toml")])
FAST = {"bert_tiny", "gpt_22b_tp8_sequence_parallel"}

# A model with the other form of every layer.
LLAMA: dict[str, Any] = {
    "activation": "swiglu",
    "normalization": "rms_norm",
    "position": "rotary",
    "linear_biases": False,
    "tied_embeddings": False,
    "num_kv_heads": 2,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "embedding_dropout": 0.1,
    "recompute": "selective",
}


def config_of(model: dict[str, Any], **parallel: Any) -> TrainConfig:
    return TrainConfig(
        GPTConfig(num_layers=4, hidden_size=64, num_heads=8, seq_len=32, vocab_size=500, **model),
        ParallelConfig(**parallel),
        training=TrainingConfig(global_batch_size=8, microbatch_size=2, dtype="bfloat16"),
    )


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=() if p.stem in FAST else pytest.mark.slow, id=p.stem) for p in FILES]
)
def test_our_own_configs_are_right(path: Path) -> None:
    result = verify_config(load_config(path))
    assert result, result.table()
    # Errors are far below the limits, so that a right layout also passes on another machine.
    assert all(row.error <= 0.3 * row.allowed for row in result.layouts[0].rows), result.table()


SP = {"tensor_parallel_size": 2, "sequence_parallel": True}
OTHERS = {
    "llama tp4": (LLAMA, {"tensor_parallel_size": 4, "data_parallel_size": 1}),
    "llama sp pp dp": (LLAMA, {**SP, "pipeline_parallel_size": 2, "data_parallel_size": 2}),
    "zb_v sp": (
        {"tied_embeddings": False},
        {**SP, "pipeline_parallel_size": 2, "schedule": "zb_v", "stages_per_rank": 2},
    ),
    "zb_h1": ({"query_key_norm": True}, {"pipeline_parallel_size": 4, "schedule": "zb_h1", "data_parallel_size": 2}),
    "stages on one rank": ({}, {"stages_per_rank": 3, "schedule": "interleaved_zero_bubble", "data_parallel_size": 1}),
    "cut": (
        {"recompute": "full"},
        {"pipeline_parallel_size": 2, "stages_per_rank": 2, "pipeline_cut": (2, 1, 1, 0)},
    ),
    "no overlap": ({"qkv_bias": False}, {**SP, "overlap": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("own_dtype", [False, True], ids=["float32", "bfloat16"])
def test_other_forms_and_schedules_are_right_in_both_precisions(name: str, own_dtype: bool) -> None:
    model, parallel = OTHERS[name]
    result = verify_config(config_of(model, **parallel), own_dtype=own_dtype)
    assert result, result.table()
    assert ("bfloat16" if own_dtype else "float32") in result.setting


@pytest.mark.slow
def test_all_pairs_of_the_axes_run_one_after_the_other() -> None:
    config = config_of({}, tensor_parallel_size=2, pipeline_parallel_size=2, data_parallel_size=2)
    result = verify_config(config, all_pairs=True)
    assert result and [layout.num_ranks for layout in result.layouts] == [4, 4, 4]
    assert [layout.layout.split(", ")[0] for layout in result.layouts] == [
        "tp 2 x pp 2 (1f1b)",
        "tp 2 x dp 2",
        "pp 2 (1f1b) x dp 2",
    ]


def fails_on_the_last_rank(rank: int, world_size: int, config: TrainConfig) -> Any:
    if rank == world_size - 1 and config.parallel.data_parallel_size == 2:
        raise ValueError("this rank is out of luck")
    return run_layout(rank, world_size, config)


def test_a_rank_that_raises_is_a_result_and_names_the_axis() -> None:
    config = config_of({"num_kv_heads": 2}, data_parallel_size=2)
    result = verify_config(config, run=lambda each: run_on_ranks(fails_on_the_last_rank, each.parallel.num_ranks, each))
    (layout,) = result.layouts
    assert not result and result.first_difference is None and layout.rows == ()
    assert layout.error == "raised on rank 1: ValueError: this rank is out of luck"
    assert layout.cause is not None and layout.cause.parts == ("data parallel",)
    assert "FAILED: raised on rank 1" in result.table() and '"ok": false' in result.as_json()


def test_targets_that_count_are_spread_unevenly_over_ranks_and_microbatches() -> None:
    config = config_of({}, data_parallel_size=2)
    small = reduce_config(config, axes_in_use(config))

    class Place:
        dp_size, dp_rank = 2, 0

    first: Any = Place()
    second: Any = Place()
    second.dp_rank = 1
    (one, total), (other, same) = batch_of(small, 0, first), batch_of(small, 0, second)
    counts = [int((batch.targets != -100).sum()) for batch in (one, other)]
    assert sum(counts) == total == same and counts[0] > 1.5 * counts[1] > 0
    size = small.training.microbatch_size
    by_microbatch = [(part != -100).sum().item() for b in (one, other) for part in b.targets.split(size)]
    assert len(set(by_microbatch)) == len(by_microbatch)
    assert ((torch.cat([one.targets, other.targets]) != -100).sum(1) == 0).sum() == 1  # one sample has no target
    whole: Any = Place()
    whole.dp_size = 1
    everything, _ = batch_of(dataclasses.replace(small), 0, whole)
    assert torch.equal(everything.inputs, torch.cat([one.inputs, other.inputs]))


def test_documents_of_a_reduced_config() -> None:
    config = dataclasses.replace(config_of({}), data=DataConfig(mask_documents=True))
    place: Any = SimpleNamespace(dp_size=1, dp_rank=0)
    batch, total = batch_of(reduce_config(config, axes_in_use(config)), 0, place)
    starts, positions = batch.document_starts, batch.positions
    assert starts is not None and positions is not None
    assert starts[:, 0].all() and 0.1 < starts.float().mean() < 0.4
    assert torch.equal(positions == 0, starts)
    assert (batch.targets[:, :-1][starts[:, 1:]] == -100).all() and (batch.targets != -100).sum() == total
