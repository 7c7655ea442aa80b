"""Start here when a prediction has the wrong error bar, or does not say that it lies outside of the fitted runs."""

import dataclasses

import pytest

from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.prediction.cluster import Fitted, load_cluster
from fused_megatron.planning.prediction.fitted_runs import error_share, outside_of_fit, values_of

CONFIG = TrainConfig(
    model=GPTConfig(vocab_size=1000, hidden_size=1024, num_heads=8),
    parallel=ParallelConfig(tensor_parallel_size=2, data_parallel_size=4),
    training=TrainingConfig(microbatch_size=4),
)
RANGES = {name: (value, 2.0 * value) for name, value in values_of(CONFIG).items()}
CLUSTER = dataclasses.replace(load_cluster("a100"), fitted=Fitted(8.0, ("megatron-core",), (), RANGES))


def test_a_run_like_the_fitted_ones_has_their_error():
    assert outside_of_fit(CONFIG, CLUSTER, "megatron-core") == ()
    assert error_share(CLUSTER, 0) == pytest.approx(0.08)


def test_each_respect_is_named_and_widens_the_bar():
    wide = dataclasses.replace(CONFIG, parallel=ParallelConfig(tensor_parallel_size=8, data_parallel_size=4))
    outside = outside_of_fit(wide, CLUSTER, "fused-megatron")
    assert outside == (
        "engine fused-megatron: the fitted runs are of megatron-core",
        "gpus=32: the fitted runs have 8 to 16",
        "tensor_parallel_size=8: the fitted runs have 2 to 4",
    )
    assert error_share(CLUSTER, len(outside)) == pytest.approx(0.08 * 2.5)


def test_an_axis_that_no_fitted_run_used_is_outside():
    ranges = {name: limits for name, limits in RANGES.items() if name != "expert_parallel_size"}
    cluster = dataclasses.replace(CLUSTER, fitted=Fitted(8.0, ("megatron-core",), (), ranges))
    model = dataclasses.replace(CONFIG.model, num_experts=4)
    config = dataclasses.replace(
        CONFIG, model=model, parallel=dataclasses.replace(CONFIG.parallel, expert_parallel_size=4)
    )
    assert any("expert_parallel_size=4" in text for text in outside_of_fit(config, cluster, "megatron-core"))


def test_constants_of_data_sheets_say_so():
    cluster = dataclasses.replace(CLUSTER, fitted=None)
    (text,) = outside_of_fit(CONFIG, cluster, "megatron-core")
    assert "data sheets" in text
    assert error_share(cluster, 1) == pytest.approx(0.3)
