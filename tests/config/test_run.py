"""Start here when a config with sizes that do not fit each other is accepted, or refused with an unclear line."""

import dataclasses
from typing import Any

import pytest

from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig

MODEL = GPTConfig(num_layers=2, hidden_size=48, num_heads=6, seq_len=6)
SP = {"tensor_parallel_size": 2, "sequence_parallel": True}


def config_of(model: GPTConfig = MODEL, **parallel: Any) -> TrainConfig:
    training = TrainingConfig(global_batch_size=4, microbatch_size=1)
    return TrainConfig(model, ParallelConfig(**parallel), training=training)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            {"context_parallel_size": 7},
            "seq_len=6 must be at least context_parallel_size=7: every rank needs a position",
        ),
        (
            {"context_parallel_size": 4, **SP},
            "seq_len=6 must be at least context_parallel_size=4 x tensor_parallel_size=2: every rank needs a position",
        ),
        ({"context_parallel_size": 0}, "context_parallel_size=0 must be 1 or more"),
        (
            {"context_parallel_size": 2, "context_parallel_method": "rings"},
            "context_parallel_method='rings' must be one of: 'ring', 'all_gather', 'all_to_all',",
        ),
        (
            {"context_parallel_size": 2, "context_parallel_method": "all_to_all", "tensor_parallel_size": 2},
            "num_heads / tensor_parallel_size = 3 must be divisible by context_parallel_size=2 with "
            "context_parallel_method='all_to_all' (any number of heads: 'ring', 'all_gather')",
        ),
        (
            {"context_parallel_size": 2, "data_parallel_size": 2, "zero_shard_size": 3},
            "data_parallel_size x context_parallel_size=4 must be divisible by zero_shard_size=3",
        ),
    ],
)
def test_context_parallel_sizes_that_do_not_fit(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        config_of(**parallel)
    assert str(refused.value).startswith(message)


def test_sequence_parallel_blocks_of_context_parallel_ranks() -> None:
    config_of(context_parallel_size=3, **SP)
    with pytest.raises(InputError, match="seq_len=7 must be divisible by tensor_parallel_size=2"):
        config_of(dataclasses.replace(MODEL, seq_len=7), context_parallel_size=2, **SP)


def test_ranks_and_replicas() -> None:
    parallel = config_of(context_parallel_size=2, data_parallel_size=2, **SP).parallel
    assert (parallel.num_ranks, parallel.replicas(2), parallel.row_multiple) == (8, 4, 2)
    assert parallel.sequence_text == " cp=2 (ring) sequence parallel"
    assert (ParallelConfig().row_multiple, ParallelConfig().sequence_text) == (1, "")
