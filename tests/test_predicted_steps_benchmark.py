"""Start here when `make bench-predicted` runs other layouts than it says, or judges its figures wrong."""

import dataclasses
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.prediction.measured_steps import StepTimes
from fused_megatron.planning.prediction.step_time import predict_step


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("predicted_steps")


def test_twenty_layouts_of_one_model_and_batch(benchmark_module: ModuleType) -> None:
    layouts = sys.modules["predicted_layouts"]
    size = benchmark_module.SIZES["small"]
    cpu = dataclasses.replace(load_cluster("h100"), device="cpu", gpus_per_node=2)
    for ranks in (2, 4):
        cases = layouts.cases_of(ranks)
        assert len({case.name for case in cases}) == len(cases) == 20
        for case in cases:
            config = layouts.config_of(size, case)
            assert config.parallel.num_ranks == ranks
            assert dataclasses.replace(config.model, recompute="none") == size.config
            samples = config.training.microbatch_size * case.microbatches * (config.parallel.data_parallel_size or 1)
            assert samples == config.training.global_batch_size == size.num_sequences
            assert predict_step(config, cpu).seconds > 0


def test_bars(benchmark_module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def missed(ranks: int, *pairs: tuple[float, float]) -> list[str]:
        rows = [benchmark_module.Row(f"{i}", *pair) for i, pair in enumerate(pairs)]
        return benchmark_module.report(rows, {"one": StepTimes((1.0,), (0.25,))}, ranks)

    assert missed(2, (1.0, 1.05), (2.0, 2.1), (3.0, 2.5)) == []
    assert "held the cores for 25% of the time" in capsys.readouterr().out
    assert missed(2, (1.0, 1.2), (2.0, 2.5), (3.0, 3.6)) == ["median error 20.0%", "worst error 25.0%"]
    assert missed(2, (1.0, 1.05), (1.04, 1.04), (3.0, 3.0)) == ["chosen layout +4.0% over the fastest"]
    assert missed(4, (1.0, 9.0), (2.0, 5.0), (3.0, 7.0)) == ["rank correlation -0.500"]
    assert missed(4, (1.0, 10.0), (2.0, 20.0), (3.0, 70.0)) == []
