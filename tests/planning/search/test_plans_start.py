"""Start here when the config of a plan does not start, or needs more memory than the plan says."""

import random
from dataclasses import replace
from typing import Any

import pytest

from fused_megatron.config import GPTConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.dry_run import DryRun
from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.search.best_layouts import find_best
from fused_megatron.planning.search.fewest_gpus import fewest_gpus


def random_workload(draw: random.Random) -> tuple[TrainConfig, int, float]:
    """Return a small model and batch, a number of GPUs, and the GB of a GPU."""
    heads = draw.choice([2, 4, 6, 8, 12])
    form: dict[str, Any] = draw.choice(
        [
            {},
            {"activation": "swiglu", "normalization": "rms_norm", "position": "rotary", "linear_biases": False},
            {"num_experts": draw.choice([2, 4, 6]), "linear_biases": False},
        ]
    )
    model = GPTConfig(
        num_layers=draw.randint(2, 6),
        hidden_size=heads * draw.choice([8, 16]),
        num_heads=heads,
        num_kv_heads=draw.choice([each for each in (1, 2, 3, heads) if heads % each == 0]),
        seq_len=draw.choice([32, 64, 256]),
        vocab_size=draw.randint(100, 5000),
        tied_embeddings=draw.random() < 0.5,
        **form,
    )
    batch = draw.choice([12, 24])
    dtype = draw.choice(["float32", "bfloat16"])
    training = TrainingConfig(global_batch_size=batch, microbatch_size=1, dtype=dtype)
    return TrainConfig(model, training=training), draw.choice([1, 2, 3, 4, 6, 8, 16]), draw.choice([2.5, 4.0])


def real_workload(draw: random.Random) -> tuple[TrainConfig, int, float]:
    """Return a model and a batch as they are trained, a number of GPUs, and the GB of a GPU."""
    hidden, layers = draw.choice([(1024, 24), (2048, 24), (4096, 32), (5120, 40), (8192, 80), (12288, 96)])
    heads = hidden // 128
    llama: dict[str, Any] = {"activation": "swiglu", "normalization": "rms_norm", "position": "rotary"}
    llama |= {"linear_biases": False, "tied_embeddings": False, "num_kv_heads": draw.choice([8, heads])}
    experts: dict[str, Any] = {**llama, "num_experts": draw.choice([8, 64]), "experts_per_token": draw.choice([2, 8])}
    experts["expert_ffn_hidden_size"] = draw.choice([1024, 4096])
    form: dict[str, Any] = draw.choice([{}, llama, llama, experts])
    model = GPTConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        seq_len=draw.choice([2048, 4096, 8192]),
        vocab_size=draw.choice([32000, 50257, 128256]),
        **form,
    )
    batch = draw.choice([256, 512, 1024, 1536])
    training = TrainingConfig(global_batch_size=batch, microbatch_size=1, dtype="bfloat16")
    return TrainConfig(model, training=training), draw.choice([8, 16, 24, 64, 96, 128, 256, 512]), 80.0


@pytest.mark.parametrize(
    ("workload", "seeds"),
    [
        pytest.param(random_workload, range(4), id="4"),
        pytest.param(random_workload, range(4, 104), id="100", marks=pytest.mark.slow),
        pytest.param(real_workload, range(40), id="40-real", marks=pytest.mark.slow),
    ],
)
def test_random_plans_pass_the_dry_run_or_do_not_fit(workload: Any, seeds: range) -> None:
    num_fit = 0
    for seed in seeds:
        draw = random.Random(seed)
        base, gpus, memory_gb = workload(draw)
        cluster = replace(load_cluster("h100"), memory_gb=memory_gb)
        plans = find_best(base, gpus, cluster).plans
        if not plans:
            fit = fewest_gpus(base, cluster, gpus)
            assert fit is None or fit.num_gpus > gpus, seed
            continue
        num_fit += 1
        plan = draw.choice(plans)
        run = DryRun(plan.config)
        assert run.world_size == gpus, seed
        for rank in run.pipeline_ranks():
            assert run.rank(rank).peak_bytes <= plan.memory_bytes, (seed, plan.layout, plan.settings)
    assert num_fit > len(seeds) // 2
