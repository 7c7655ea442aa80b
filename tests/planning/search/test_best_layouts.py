"""Start here when `plan` does not find the fastest layout, or its lower bounds exceed a prediction."""

import itertools
from dataclasses import replace

import pytest

from fused_megatron.config import GPTConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.engine_memory import device_memory
from fused_megatron.planning.prediction.cluster import Cluster, MeasuredBlock, load_cluster
from fused_megatron.planning.prediction.step_time import predict_step
from fused_megatron.planning.search import best_layouts
from fused_megatron.planning.search.best_layouts import SAME, find_best, limit_bytes
from fused_megatron.planning.search.fewest_gpus import fewest_gpus
from fused_megatron.planning.search.floors import Floors
from fused_megatron.planning.search.layouts import (
    Layout,
    Refusals,
    Settings,
    sequence_choices,
    train_config,
    valid_layouts,
)
from fused_megatron.planning.search.pipelines import pipelines
from fused_megatron.planning.search.recomputations import recomputations

LLAMA = {
    "activation": "swiglu",
    "normalization": "rms_norm",
    "position": "rotary",
    "linear_biases": False,
    "tied_embeddings": False,
    "num_kv_heads": 4,
}
EXPERTS = {"num_experts": 8, "experts_per_token": 2, "expert_ffn_hidden_size": 1024, "linear_biases": False}


def workload(batch: int, **model: object) -> TrainConfig:
    sizes = {"num_layers": 8, "hidden_size": 2048, "num_heads": 16, "seq_len": 2048, "vocab_size": 32000}
    training = TrainingConfig(global_batch_size=batch, microbatch_size=1, dtype="bfloat16")
    return TrainConfig(GPTConfig(**{**sizes, **model}), training=training)  # type: ignore[arg-type]


def h100(memory_gb: float = 80.0, blocks: tuple[MeasuredBlock, ...] = ()) -> Cluster:
    return replace(load_cluster("h100"), memory_gb=memory_gb, blocks=blocks)


def all_settings(base: TrainConfig, layout: Layout, floors: Floors) -> list[Settings]:
    """Return every combination that the search may choose."""
    sizes = [size for size in best_layouts.MICROBATCHES if base.training.global_batch_size // layout.dp % size == 0]
    found = []
    for size, shards in itertools.product(sizes, sequence_choices(base, layout)):
        for name, per_rank in pipelines(layout.pp, base.model.num_layers):
            first = Settings(size, shards, name, per_rank)
            blocks = base.model.num_layers // layout.pp
            for zero in floors.zero_stages(layout):
                found += recomputations(first._replace(zero_stage=zero), blocks)
    return found


# Bounds must hold whichever shapes were measured, and however far they are from the constants.
UNEVEN = (MeasuredBlock(2048, 16, 2048, 2, 2048, 0.4, ("a",)), MeasuredBlock(2048, 16, 2048, 1, 4096, 2.5, ("b",)))


@pytest.mark.parametrize(
    ("model", "batch", "gpus", "cluster"),
    [
        ({}, 8, 2, h100(8.3)),  # three layouts fit only if whole blocks are recomputed
        ({**LLAMA, "num_layers": 4}, 4, 4, h100(5.5, UNEVEN)),
        (EXPERTS, 4, 2, h100(9.0)),
    ],
    ids=["gpt", "llama", "experts"],
)
def test_search_finds_what_brute_force_finds(model: dict[str, object], batch: int, gpus: int, cluster: Cluster) -> None:
    base = workload(batch, **model)
    floors, best = Floors(base, gpus, cluster), dict[Layout, float]()
    too_large = 0
    for layout in valid_layouts(base, gpus, cluster, Refusals()):
        for settings in all_settings(base, layout, floors):
            config = train_config(base, layout, settings)
            needed = device_memory(config, cluster).total
            assert floors.least_memory(layout) <= floors.memory(layout, settings) <= needed, (layout, settings)
            if needed > limit_bytes(cluster):
                too_large += 1
                continue
            seconds = predict_step(config, cluster).seconds
            least = floors.least_seconds(layout, *settings[:2], settings.recompute)
            assert (
                floors.least_seconds(layout, *settings[:2]) <= least <= floors.seconds(layout, settings) <= seconds
            ), (layout, settings)
            best[layout] = min(seconds, best.get(layout, seconds))
    search = find_best(base, gpus, cluster, num_best=100)
    assert too_large and {plan.layout for plan in search.plans} == set(best)
    for plan in search.plans:
        tolerance = 1 + SAME + best_layouts._surcharge(plan.layout, plan.settings)
        assert best[plan.layout] <= plan.prediction.seconds <= tolerance * best[plan.layout], plan.layout
        assert plan.memory == device_memory(plan.config, cluster)
    seconds = [plan.prediction.seconds for plan in search.plans]
    assert seconds == sorted(seconds)
    few = find_best(base, gpus, cluster, num_best=2)
    assert few.plans[0].prediction.seconds <= (1 + 2 * SAME) * seconds[0]
    assert few.num_slower + few.num_too_large + len(few.plans) + few.refused.total == few.num_layouts


def test_the_same_input_gives_the_same_plans() -> None:
    first, second = (find_best(workload(8, **LLAMA), 4, h100(12.0)) for _ in range(2))
    assert [(plan.layout, plan.settings) for plan in first.plans] == [
        (plan.layout, plan.settings) for plan in second.plans
    ]


def test_the_fewest_gpus_are_enough_and_no_fewer() -> None:
    base, cluster = workload(64, num_layers=12, hidden_size=4096, num_heads=32), h100(24.0)
    assert not find_best(base, 1, cluster).plans
    fit = fewest_gpus(base, cluster, 1)
    assert fit is not None and fit.memory_bytes <= limit_bytes(cluster)
    assert find_best(base, fit.num_gpus, cluster).plans
    assert not find_best(base, fit.num_gpus // 2, cluster).plans


@pytest.mark.parametrize("scatters", [True, False])
def test_bounds_hold_messages_in_parts_of_pipelines_only(scatters: bool) -> None:
    """Times of layers are shared by layouts, but a stage of a pipeline gathers its messages, and sends other bytes."""
    base, cluster = workload(16, **LLAMA), h100()
    base = replace(base, parallel=replace(base.parallel, scatter_messages=scatters))
    floors, tp4 = Floors(base, 16, cluster), Layout(4, 1, 1, 4, 1, 1)
    for pp, name in ((1, "1f1b"), (4, "1f1b"), (2, "zb_v")):
        layout, settings = tp4._replace(pp=pp, dp=4 // pp), Settings(1, False, name, 2 if name == "zb_v" else 1)
        assert floors.seconds(layout, settings) == Floors(base, 16, cluster).seconds(layout, settings)
        config = train_config(base, layout, settings)
        assert config.parallel.scatters_messages == (scatters and pp > 1)
        assert floors.seconds(layout, settings) <= predict_step(config, cluster).seconds
