"""Start here when a stage of ZeRO gives other weights than stage 0, or a rank holds more bytes than its share."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fused_megatron.assembly.assemble import Assembly, assemble
from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.assembly.training_step import sum_over_ranks
from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.data_parallel.placement import ZERO_STAGES, zero_stage
from fused_megatron.data_parallel.weight_gather import WeightGather
from fused_megatron.testing.run_on_ranks import run_on_ranks

# 101 entries and 36 features: parameters of which three and four ranks get uneven rows, or none.
MODEL = GPTConfig(num_layers=4, hidden_size=36, num_heads=4, seq_len=12, vocab_size=101)
LLAMA = {"num_kv_heads": 1, "activation": "swiglu", "normalization": "rms_norm", "position": "rotary"}
CONFIG = TrainConfig(MODEL, training=TrainingConfig(global_batch_size=24, microbatch_size=2, bucket_mb=0.02))


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
    assembly.update(1e-2, min(1.0, 0.3 / norm))
    spoilt = assembly.gradients.rows.num_shards > 1 and isinstance(assembly.weights, WeightGather)
    for parameter in assembly.parameters.values() if spoilt else ():
        updated = assembly.gradients.rows.own(parameter.detach())
        kept = updated.clone()
        parameter.detach().fill_(torch.nan)
        updated.copy_(kept)
    return norm


def weights_and_norms(rank: int, world_size: int, config: TrainConfig) -> tuple[dict[str, torch.Tensor], list[float]]:
    assembly = assembled(config)
    norms = [step(assembly, number) for number in range(3)]
    with assembly.weights.whole():
        return {name: p.detach().clone() for name, p in assembly.parameters.items()}, norms


def of_stage(config: TrainConfig, stage: int) -> TrainConfig:
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, zero_stage=stage))


def config_of(layout: dict[str, Any], model: dict[str, Any], dtype: str) -> TrainConfig:
    return dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(MODEL, **model),
        parallel=ParallelConfig(**layout),
        training=dataclasses.replace(CONFIG.training, dtype=dtype),
    )


CASES: list[tuple[int, dict[str, Any], dict[str, Any], str]] = [
    (2, {}, {}, "float32"),
    (3, {}, LLAMA, "bfloat16"),
    (4, {"tensor_parallel_size": 2, "sequence_parallel": True}, {"recompute": "full"}, "float32"),
    (4, {"pipeline_parallel_size": 2, "stages_per_rank": 2}, {"recompute": "selective"}, "bfloat16"),
]
SLOW_CASES: list[tuple[int, dict[str, Any], dict[str, Any], str]] = [
    (2, {}, {}, "bfloat16"),
    (3, {}, {"tied_embeddings": False}, "float32"),
    (4, {}, LLAMA, "float32"),
    (4, {"tensor_parallel_size": 2}, {"num_kv_heads": 1}, "bfloat16"),
    (4, {"pipeline_parallel_size": 2}, {}, "float32"),
    (4, {"pipeline_parallel_size": 2, "schedule": "zb_h1"}, {}, "float32"),
    (8, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, LLAMA, "float32"),
]


@pytest.mark.parametrize(
    ("ranks", "layout", "model", "dtype"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
    ids=str,
)
def test_stage_1_has_the_bits_of_stage_0(ranks: int, layout: dict[str, Any], model: dict[str, Any], dtype: str) -> None:
    config = config_of(layout, model, dtype)
    whole = run_on_ranks(weights_and_norms, ranks, of_stage(config, 0))
    sharded = run_on_ranks(weights_and_norms, ranks, of_stage(config, 1))
    for (wanted, norms), (found, same_norms) in zip(whole, sharded, strict=True):
        assert norms == same_norms and min(norms) > 0.3, "clipping must clip"
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def state_bytes(rank: int, world_size: int, config: TrainConfig) -> tuple[int, int, int]:
    """What this rank's moments and main weights take, what its share is by rows, and its number of parameters."""
    assembly = assembled(config)
    own = [tensor for kinds in assembly.optimizer.state().values() for tensor in kinds.values()]
    held = sum(storage.nbytes() for storage in {t.untyped_storage()._cdata: t.untyped_storage() for t in own}.values())
    rows = assembly.gradients.rows
    share = sum(rows.own(parameter.detach()).numel() for parameter in assembly.parameters.values())
    return held, share, sum(parameter.numel() for parameter in assembly.parameters.values())


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 8), ("bfloat16", 12)])
def test_a_rank_holds_the_state_of_its_rows_only(dtype: str, bytes_each: int) -> None:
    config = of_stage(config_of({}, {}, dtype), 1)
    found = run_on_ranks(state_bytes, 3, config)
    assert all(held == bytes_each * share for held, share, _ in found)
    assert sum(share for _, share, _ in found) == found[0][2]
    assert max(share for _, share, _ in found) < 0.4 * found[0][2]


def test_the_stage_follows_from_the_replicas_where_none_is_given() -> None:
    assert [zero_stage(None, 1), zero_stage(None, 2), zero_stage(0, 4), zero_stage(1, 1)] == [0, 1, 0, 1]
    assert set(ZERO_STAGES) == {0, 1, 2, 3}
    for wrong in (4, -1, "one"):
        with pytest.raises(InputError, match=rf"zero_stage={wrong} must be 0, 1, 2 or 3"):
            ParallelConfig(zero_stage=wrong)
