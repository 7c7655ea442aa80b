"""Start here when a plan or a prediction warns of a layout without a reason, or does not warn."""

from typing import Any

import pytest

from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.search.pitfalls import pitfalls


def warnings(batch: int = 256, model: dict[str, Any] | None = None, **parallel: Any) -> list[str]:
    sizes = {"num_layers": 32, "hidden_size": 8192, "num_heads": 64, "seq_len": 2048, "vocab_size": 50000}
    config = TrainConfig(
        GPTConfig(**{**sizes, **(model or {})}),
        ParallelConfig(**parallel),
        training=TrainingConfig(global_batch_size=batch, microbatch_size=1, dtype="bfloat16"),
    )
    return pitfalls(config, load_cluster("h100"))


def test_a_good_layout_has_none() -> None:
    assert warnings(tensor_parallel_size=8, pipeline_parallel_size=2, data_parallel_size=4, zero_stage=1) == []


@pytest.mark.parametrize(
    ("start", "batch", "model", "parallel"),
    [
        ("tp=16 spans nodes of 8 GPUs", 256, {}, {"tensor_parallel_size": 16}),
        ("tp=8 on a small model", 256, {"hidden_size": 1024, "num_heads": 16}, {"tensor_parallel_size": 8}),
        ("unbalanced stages: ", 256, {"num_layers": 9}, {"pipeline_parallel_size": 8, "data_parallel_size": 1}),
        ("too few microbatches: 8 for 8", 8, {}, {"pipeline_parallel_size": 8, "data_parallel_size": 1}),
        ("ZeRO-3 over a slow network", 256, {"seq_len": 512}, {"data_parallel_size": 64, "zero_stage": 3}),
    ],
)
def test_pitfall(start: str, batch: int, model: dict[str, Any], parallel: dict[str, Any]) -> None:
    assert [line.startswith(start) for line in warnings(batch, model, **parallel)] == [True]


def test_more_stages_a_rank_and_more_microbatches_shrink_the_bubble() -> None:
    pipeline = {"pipeline_parallel_size": 8, "data_parallel_size": 1}
    assert warnings(64, **pipeline) == []
    assert warnings(32, **pipeline) != []
    assert warnings(32, **pipeline, schedule="interleaved_1f1b", stages_per_rank=4) == []
