"""Start here when the learning rate is off at some step."""

import math

import pytest

from fused_megatron.config import OptimizerConfig
from fused_megatron.training.learning_rate import learning_rate


def test_warm_up_then_cosine() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=4)
    rates = [learning_rate(step, 13, config) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 2)))
    assert rates[12] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(1, 0), (1, 5), (3, 3), (5, 100)])
def test_short_runs(num_steps: int, warmup_steps: int) -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.0, warmup_steps=warmup_steps)
    rates = [learning_rate(step, num_steps, config) for step in range(num_steps)]
    assert all(0 <= rate <= 1 for rate in rates) and rates[0] > 0
