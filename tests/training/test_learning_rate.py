"""Start here when the learning rate is off at some step."""

import math
from typing import Any

import pytest

from fused_megatron.checks import InputError
from fused_megatron.config import OptimizerConfig
from fused_megatron.training.learning_rate import learning_rate


def test_warm_up_then_cosine() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=4)
    rates = [learning_rate(step, 13, config) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 2)))
    assert rates[12] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def rates(num_steps: int, **settings: Any) -> list[float]:
    config = OptimizerConfig(**{"lr": 1.0, "min_lr": 0.25, "warmup_steps": 2, **settings})
    return [round(learning_rate(step, num_steps, config), 12) for step in range(num_steps)]


def test_every_schedule() -> None:
    assert rates(7, schedule="linear") == [0.5, 1, 1, 0.8125, 0.625, 0.4375, 0.25]
    assert rates(7, schedule="linear", decay_steps=4) == [0.5, 1, 1, 0.75, 0.5, 0.25, 0.25]
    assert rates(7, schedule="cosine", decay_steps=3) == [0.5, 1, 1, 0.625, 0.25, 0.25, 0.25]
    assert rates(7, schedule="constant") == [0.5, 1, 1, 1, 1, 1, 1]
    assert rates(7, schedule="wsd", decay_steps=3) == [0.5, 1, 1, 1, 0.75, 0.5, 0.25]
    assert rates(30, schedule="wsd")[-4:] == [1, 0.75, 0.5, 0.25]
    assert rates(4, schedule="wsd", decay_steps=9) == [0.5, 1, 0.625, 0.25]


@pytest.mark.parametrize(
    "settings", [{"schedule": "cosine"}, {"schedule": "linear"}, {"schedule": "wsd"}], ids=lambda s: s["schedule"]
)
def test_a_run_with_decay_steps_of_its_own_can_be_prolonged(settings: dict[str, str]) -> None:
    short, long = (rates(num_steps, decay_steps=5, **settings) for num_steps in (10, 20))
    assert short[:5] == long[:5]
    assert settings["schedule"] == "wsd" or short == long[:10]


def test_the_default_is_the_curve_of_before_bit_for_bit() -> None:
    config = OptimizerConfig()
    for step in range(20, 300):
        progress = (step - 20) / max(1, 300 - 1 - 20)
        before = 1e-4 + 0.5 * (1e-3 - 1e-4) * (1 + math.cos(math.pi * min(1.0, progress)))
        assert learning_rate(step, 300, config) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, "schedule='cosin' must be one of: 'cosine', 'constant', 'wsd', 'linear'"),
        ({"decay_steps": 0}, "decay_steps=0 must be 1 or more"),
        ({"schedule": "constant", "decay_steps": 3}, "decay_steps=3 has no place in schedule='constant'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OptimizerConfig(**settings)


@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(1, 0), (1, 5), (3, 3), (5, 100)])
def test_short_runs(num_steps: int, warmup_steps: int) -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.0, warmup_steps=warmup_steps)
    rates = [learning_rate(step, num_steps, config) for step in range(num_steps)]
    assert all(0 <= rate <= 1 for rate in rates) and rates[0] > 0
