"""Start here when a stage of ZeRO gives other weights than stage 0, or a rank holds more bytes than its share."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fused_megatron.assembly.assemble import Assembly, assemble
from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.assembly.step_sums import sum_over_ranks
from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.data_parallel.fixed_sizes import aligned
from fused_megatron.data_parallel.placement import ZERO_STAGES, zero_stage
from fused_megatron.data_parallel.weight_gather import WeightGather
from fused_megatron.data_parallel.weight_units import weight_units
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks

# 101 entries and 36 features: parameters of which three and four ranks get uneven rows, or none.
MODEL = GPTConfig(num_layers=4, hidden_size=36, num_heads=4, seq_len=12, vocab_size=101)
LLAMA = {"num_kv_heads": 1, "activation": "swiglu", "normalization": "rms_norm", "position": "rotary"}
CONFIG = TrainConfig(MODEL, training=TrainingConfig(global_batch_size=24, microbatch_size=2, bucket_mb=0.02))

LR = 5e-4  # of a GPT; AdamW turns a rounding error of a tiny gradient into a part of this


def assembled(config: TrainConfig) -> Assembly:
    mesh, plan = build_mesh(config), plan_pipeline(config)
    return assemble(config, mesh, plan, build_stages(config, mesh, plan, torch.device("cpu")))


def step(assembly: Assembly, number: int) -> float:
    """One step on random tokens with clipping; rows that other ranks update are spoilt before they arrive."""
    training, mesh, config = assembly.config.training, assembly.mesh, assembly.config.model
    batch, own = training.global_batch_size, training.global_batch_size // mesh.dp_size
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(int(config.vocab_size or 0), (batch, config.seq_len + 1), generator=generator)
    rows = tokens[mesh.dp_rank * own : (mesh.dp_rank + 1) * own].split(training.microbatch_size)
    assembly.gradients.zero_()
    loss_sum = assembly.accumulate_gradients(
        [row[:, :-1].contiguous() for row in rows],
        [row[:, 1:].contiguous() for row in rows],
        loss_divisor=float(batch * config.seq_len),
    )
    norm = sum_over_ranks(assembly, loss_sum, (), dist.group.WORLD).gradient_norm
    assembly.update(LR, min(1.0, 0.3 / norm))
    spoilt = assembly.replicas.dense.rows.num_shards > 1 and isinstance(assembly.weights, WeightGather)
    for parameter in assembly.parameters.values() if spoilt else ():
        updated = assembly.replicas.dense.rows.own(parameter.detach())
        kept = updated.clone()
        parameter.detach().fill_(torch.nan)
        updated.copy_(kept)
    return norm


def weights_and_norms(rank: int, world_size: int, config: TrainConfig) -> tuple[dict[str, torch.Tensor], list[float]]:
    assembly = assembled(config)
    norms = [step(assembly, number) for number in range(2)]  # the second takes the weights and the state of the first
    with assembly.weights.whole():
        return {name: p.detach().clone() for name, p in assembly.parameters.items()}, norms


def of_every_stage(ranks: int, config: TrainConfig, stages: Sequence[int]) -> list[list[Any]]:
    """What weights_and_norms finds on every rank, for each stage."""
    return run_cases_on_ranks(weights_and_norms, ranks, [(of_stage(config, stage),) for stage in stages])


def of_stage(config: TrainConfig, stage: int) -> TrainConfig:
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, zero_stage=stage))


def config_of(
    layout: dict[str, Any], model: dict[str, Any], dtype: str, microbatches: int = 1, replicas: int = 1
) -> TrainConfig:
    """A config in which every replica has some microbatches of two samples."""
    return dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(MODEL, **model),
        parallel=ParallelConfig(**layout),
        training=dataclasses.replace(CONFIG.training, dtype=dtype, global_batch_size=2 * microbatches * replicas),
    )


# Ranks, replicas among them, layout, model, dtype.
Case = tuple[int, int, dict[str, Any], dict[str, Any], str]
CASES: list[Case] = [
    (2, 2, {}, {"tied_embeddings": False}, "float32"),
    (3, 3, {}, LLAMA, "bfloat16"),
    (4, 2, {"tensor_parallel_size": 2, "sequence_parallel": True}, {"recompute": "full"}, "float32"),
]
SLOW_CASES: list[Case] = [
    (1, 1, {}, {}, "float32"),
    (2, 2, {}, {"recompute": "full"}, "bfloat16"),
    (4, 4, {}, LLAMA, "float32"),
    (4, 2, {"tensor_parallel_size": 2}, {"num_kv_heads": 1}, "bfloat16"),
]


@pytest.mark.parametrize(
    ("ranks", "replicas", "layout", "model", "dtype"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
    ids=str,
)
def test_every_stage_has_the_bits_of_stage_0(
    ranks: int, replicas: int, layout: dict[str, Any], model: dict[str, Any], dtype: str
) -> None:
    """Without accumulation all sums have the same order."""
    whole, *sharded = of_every_stage(ranks, config_of(layout, model, dtype, 1, replicas), (0, 1, 2, 3))
    for found in sharded:
        for (wanted, norms), (weights, same_norms) in zip(whole, found, strict=True):
            assert norms == same_norms and min(norms) > 0.3, "clipping must clip"
            assert wanted.keys() == weights.keys()
            assert all(torch.equal(wanted[name], weights[name]) for name in wanted)


PIPELINE = {"pipeline_parallel_size": 2}
ACCUMULATED: list[tuple[int, int, dict[str, Any], dict[str, Any]]] = [
    (2, 2, {}, {}),
    (4, 2, {**PIPELINE, "stages_per_rank": 2}, {"recompute": "selective"}),
    (4, 4, {"zero_shard_size": 2}, {}),
    (4, 2, {**PIPELINE, "schedule": "looped_breadth_first", "stages_per_rank": 2, "zero_gather": "step"}, {}),
]
SLOW_ACCUMULATED: list[tuple[int, int, dict[str, Any], dict[str, Any]]] = [
    (1, 1, {}, LLAMA),
    (2, 2, {"zero_shard_size": 1}, {}),
    (3, 3, {}, {"tied_embeddings": False}),
    (2, 2, {"zero_gather": "step"}, LLAMA),
    (4, 2, {**PIPELINE, "schedule": "zb_v"}, {}),
    (4, 2, {**PIPELINE, "schedule": "zb_h1"}, {"tied_embeddings": False}),
    (4, 2, {"tensor_parallel_size": 2, "sequence_parallel": True}, {"num_kv_heads": 1, "recompute": "full"}),
    (8, 2, {**PIPELINE, "tensor_parallel_size": 2}, LLAMA),
    (8, 4, {**PIPELINE, "zero_shard_size": 2}, {}),
]


@pytest.mark.parametrize(
    ("ranks", "replicas", "layout", "model"),
    [*ACCUMULATED, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_ACCUMULATED)],
    ids=str,
)
def test_stages_agree_where_sums_have_another_order(
    ranks: int, replicas: int, layout: dict[str, Any], model: dict[str, Any]
) -> None:
    """Stages 2 and 3 sum over replicas in every microbatch, and then over microbatches; one rank has nothing to sum."""
    config = config_of({}, model, "float32", 4 if "pipeline_parallel_size" in layout else 2, replicas)
    sizes = {"pipeline_parallel_size", "tensor_parallel_size", "schedule", "stages_per_rank", "sequence_parallel"}
    whole = dataclasses.replace(config, parallel=ParallelConfig(**{k: v for k, v in layout.items() if k in sizes}))
    stages = (3,) if "zero_gather" in layout else (1, 2, 3)
    sharded = [dataclasses.replace(config, parallel=ParallelConfig(**layout, zero_stage=stage)) for stage in stages]
    wanted, *found = run_cases_on_ranks(weights_and_norms, ranks, [(of_stage(whole, 0),), *((c,) for c in sharded)])
    for by_rank in found:
        for (weights, norms), (others, other_norms) in zip(wanted, by_rank, strict=True):
            assert other_norms == pytest.approx(norms, rel=1e-6)
            for name, weight in weights.items():
                torch.testing.assert_close(others[name], weight, rtol=0, atol=0 if ranks == 1 else 1e-6)


def held_bytes(rank: int, world_size: int, config: TrainConfig) -> dict[str, tuple[int, int]]:
    """What this rank holds of weights, gradients and state, each as (bytes, formula)."""
    assembly = assembled(config)
    step(assembly, 0)
    placements, rows = ZERO_STAGES[config.parallel.zero_stage or 0], assembly.replicas.dense.rows
    parameters = list(assembly.parameters.values())
    size = parameters[0].element_size()
    whole, bucketed = sum(p.numel() for p in parameters), sum(aligned(p.numel()) for p in parameters)
    share = sum(rows.own(p.detach()).numel() for p in parameters)
    blocks = sum(aligned(rows.rows_per_shard(p.shape) * p[0:1].numel() if p.dim() else 1) for p in parameters)

    def held(tensors: Iterable[torch.Tensor]) -> int:
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
        return sum(storage.nbytes() for storage in storages.values())

    state = [tensor for kinds in assembly.optimizer.state().values() for tensor in kinds.values()]
    gradients = assembly.gradients.by_name(assembly.parameters).values()
    return {
        "weights": (held(assembly.own_weights.values()), size * (blocks if placements.weights else whole)),
        "gradients": (held(gradients), 4 * (blocks if placements.gradients else bucketed)),
        "state": (held(state), (8 if size == 4 else 12) * (share if placements.state else whole)),
        # Of parameters whose rows are away there is one number.
        "parameters": (held(parameters), size * whole if not placements.weights else held(parameters)),
        "share": (share, whole),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rank_holds_what_its_stage_says(dtype: str) -> None:
    configs = [(of_stage(config_of({}, {}, dtype, 2, 3), stage),) for stage in (1, 2, 3)]
    for stage, ranks in zip((1, 2, 3), run_cases_on_ranks(held_bytes, 3, configs), strict=True):
        for found in ranks:
            share, whole = found.pop("share")
            assert share < 0.4 * whole
            assert all(held == formula for held, formula in found.values()), (stage, found)
            assert stage < 3 or found["parameters"][0] < 0.01 * found["weights"][0]


def sent_bytes(
    rank: int, world_size: int, config: TrainConfig
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """What a step sends over the replicas, by kind: bytes and calls; and elements of blocks, buckets, units."""
    assembly = assembled(config)
    step(assembly, 0)
    assembly.weights.finish()
    with record_communication() as ledger:
        step(assembly, 1)
        assembly.weights.finish()
    rows = assembly.replicas.dense.rows
    padded = world_size * sum(
        aligned(rows.rows_per_shard(p.shape) * (p[0:1].numel() if p.dim() else 1)) for p in assembly.parameters.values()
    )
    units = len(list(weight_units(next(iter(assembly.model.stages.values())))))
    counts = {"padded": padded, "buckets": len(assembly.gradients.in_order_of_forward()), "units": units}
    return dict(ledger.num_bytes), dict(ledger.counts), counts


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_a_step_sends_what_its_stage_says(dtype: str, size: int) -> None:
    """A tied embedding is gathered for the first layer and for the loss; everything else for forward and backward."""
    microbatches = 2
    configs = [(of_stage(config_of({}, {}, dtype, microbatches, 2), stage),) for stage in (1, 2, 3)]
    for stage, ranks in zip((1, 2, 3), run_cases_on_ranks(sent_bytes, 2, configs), strict=True):
        for num_bytes, calls, counts in ranks:
            padded, buckets, units = counts["padded"], counts["buckets"], counts["units"]
            reductions = 1 if stage == 1 else microbatches
            gathers = 2 * microbatches if stage == 3 else 1
            assert num_bytes["reduce_scatter"] == 4 * padded * reductions, stage
            assert num_bytes["all_gather"] == size * padded * gathers, stage
            assert calls["reduce_scatter"] == buckets * reductions
            assert calls["all_gather"] == (units * gathers if stage == 3 else buckets)


def test_the_stage_follows_from_the_replicas_where_none_is_given() -> None:
    assert [zero_stage(None, 1), zero_stage(None, 2), zero_stage(0, 4), zero_stage(1, 1)] == [0, 1, 0, 1]
    assert set(ZERO_STAGES) == {0, 1, 2, 3}
    for wrong in (4, -1, "one"):
        with pytest.raises(InputError, match=rf"zero_stage={wrong} must be 0, 1, 2 or 3"):
            ParallelConfig(zero_stage=wrong)
