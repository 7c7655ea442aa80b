"""Start here when `fused-megatron calibrate` writes constants that do not describe its own measurements."""

import dataclasses
from functools import partial

import pytest

from fused_megatron.config import TrainConfig
from fused_megatron.planning.prediction.calibration import Observation, error_table, fit
from fused_megatron.planning.prediction.calibration_steps import calibration_configs
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.prediction.step_time import predict_step

TRUTH = Cluster(
    name="truth",
    device="cpu",
    gpus_per_node=2,
    memory_gb=8.0,
    peak_tflops=0.08,
    product_efficiency=0.6,
    product_us=6.0,
    attention_efficiency=0.2,
    memory_gb_per_s=9.0,
    launch_us=20.0,
    node_gb_per_s=2.0,
    node_latency_us=150.0,
    network_gb_per_s=1.0,
    network_latency_us=300.0,
    step_ms=1.5,
    transfer_overlap=0.0,
)
FITTED = ("product_efficiency", "attention_efficiency", "memory_gb_per_s", "launch_us", "node_gb_per_s")


def observations() -> list[Observation]:
    def predicted(config: TrainConfig, cluster: Cluster) -> float:
        return predict_step(config, cluster).seconds

    return [
        Observation("steps", name, predicted(config, TRUTH), partial(predicted, config))
        for name, config in list(calibration_configs("cpu", 2).items())[::-1][:6]
    ]


def test_the_fit_finds_the_constants_behind_exact_measurements() -> None:
    moved = {name: getattr(TRUTH, name) * (0.6 if i % 2 else 1.5) for i, name in enumerate(FITTED)}
    exact = observations()
    start = dataclasses.replace(TRUTH, **moved)
    found = fit(start, exact, FITTED, prior=1e-6)
    assert max(abs(o.error(start)) for o in exact) > 0.2
    for name in FITTED:
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=0.02), name
    # A measurement that took ten times as long moves the other predictions by a few percent only.
    first = dataclasses.replace(exact[0], seconds=10 * exact[0].seconds)
    disturbed = fit(start, [first, *exact[1:]], FITTED, prior=1e-6)
    assert sorted(abs(o.error(disturbed)) for o in exact)[len(exact) // 2] < 0.1
    ((kind, number, median, largest),) = error_table(found, exact)
    assert (kind, number) == ("steps", len(exact)) and median <= largest < 0.01


def test_a_share_stays_a_share() -> None:
    slow = [dataclasses.replace(o, seconds=o.seconds / 50) for o in observations()]
    assert fit(TRUTH, slow, ("product_efficiency",)).product_efficiency == 1.0


def test_configs_of_any_number_of_ranks() -> None:
    for device in ("cpu", "cuda"):
        for ranks in (1, 2, 3, 8):
            for config in calibration_configs(device, ranks).values():
                assert config.parallel.num_ranks == ranks
                assert predict_step(config, TRUTH).seconds > 0
