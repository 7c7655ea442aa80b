"""Start here when Muon differs from torch.optim.Muon, or gives other weights in another layout."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.assembly.assemble import Assembly, assemble
from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.optimizer import is_block_matrix
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.assembly.step_sums import sum_over_ranks
from fused_megatron.config import GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.data_parallel.muon import orthogonal
from fused_megatron.sharding import full_tensor, parameter_parts
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks

LLAMA = {"num_kv_heads": 1, "activation": "swiglu", "position": "rotary"}
CONFIG = TrainConfig(
    # 44 features: rows that do not divide by the replicas, and parts without rows on some of them.
    GPTConfig(num_layers=2, hidden_size=44, num_heads=4, seq_len=12, vocab_size=101),
    # eps keeps AdamW from making an update of the rounding of a key's bias, whose gradient is 0.
    optimizer=OptimizerConfig(kind="muon", lr=1e-2, weight_decay=0.1, eps=1e-4),
    training=TrainingConfig(global_batch_size=8, microbatch_size=2, bucket_mb=0.02),
)


def config_of(layout: dict[str, Any], model: dict[str, Any], dtype: str = "float32") -> TrainConfig:
    return dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, **model),
        parallel=ParallelConfig(**layout),
        training=dataclasses.replace(CONFIG.training, dtype=dtype),
    )


def assembled(config: TrainConfig) -> Assembly:
    mesh, plan = build_mesh(config), plan_pipeline(config)
    return assemble(config, mesh, plan, build_stages(config, mesh, plan, torch.device("cpu")))


def step(assembly: Assembly, number: int) -> None:
    """One step on random tokens, with clipping."""
    training, mesh, model = assembly.config.training, assembly.mesh, assembly.config.model
    own = training.global_batch_size // mesh.dp_size
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(101, (training.global_batch_size, model.seq_len + 1), generator=generator)
    rows = tokens[mesh.dp_rank * own : (mesh.dp_rank + 1) * own].split(training.microbatch_size)
    assembly.gradients.zero_()
    loss_sum = assembly.accumulate_gradients(
        [row[:, :-1].contiguous() for row in rows],
        [row[:, 1:].contiguous() for row in rows],
        loss_divisor=float(training.global_batch_size * model.seq_len),
    )
    group = dist.group.WORLD if mesh.world_size > 1 else None
    norm = sum_over_ranks(assembly, loss_sum, (), group).gradient_norm
    assembly.update(1e-2, min(1.0, 0.3 / norm))


def full_weights(rank: int, world_size: int, config: TrainConfig) -> dict[str, torch.Tensor]:
    """Train two steps; return the full main weights of this rank's stages."""
    assembly = assembled(config)
    for number in range(2):
        step(assembly, number)
    whole = assembly.whole(assembly.optimizer.main)
    tp_group = assembly.mesh.tp_group
    return {name: full_tensor(assembly.parameters[name], value, tp_group) for name, value in whole.items()}


CASES: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (2, {"tensor_parallel_size": 2, "sequence_parallel": True}, LLAMA),
    (2, {"zero_stage": 0}, LLAMA),
    (2, {"pipeline_parallel_size": 2}, {"tied_embeddings": True}),
    (4, {"tensor_parallel_size": 2, "zero_stage": 3}, LLAMA),
    (4, {"zero_stage": 2, "zero_shard_size": 2}, LLAMA),
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_layout_has_the_weights_of_one_process(ranks: int) -> None:
    cases = [(layout, model) for wanted, layout, model in CASES if wanted == ranks]
    found = run_cases_on_ranks(full_weights, ranks, [(config_of(*case),) for case in cases])
    for (layout, model), of_ranks in zip(cases, found, strict=True):
        one = full_weights(0, 1, config_of({}, model))
        for of_rank in of_ranks:
            for name, weight in of_rank.items():
                # An update moves an element by 2e-3; sums in another order and Newton-Schulz change it by 3e-7.
                torch.testing.assert_close(weight, one[name], rtol=0, atol=1e-6, msg=f"{layout} {name}")
        assert {name for of_rank in of_ranks for name in of_rank} == one.keys()


def test_replicas_that_share_the_state_have_the_bits_of_whole_replicas() -> None:
    config = config_of({}, LLAMA, "bfloat16")
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=12))
    stages = [dataclasses.replace(config, parallel=ParallelConfig(zero_stage=stage)) for stage in (0, 1)]
    whole, shared = run_cases_on_ranks(full_weights, 3, [(config,) for config in stages])
    for wanted, found in zip(whole, shared, strict=True):
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)


SETTINGS: list[dict[str, Any]] = [{}, {"momentum": 0.8, "nesterov": False, "adjust_lr_fn": "original"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_bfloat16_parameters_have_the_bits_of_torch(settings: dict[str, Any]) -> None:
    config = config_of({}, LLAMA, "bfloat16")
    assembly = assembled(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **settings)))
    ours = assembly.optimizer
    theirs: dict[str, list[nn.Parameter]] = {}
    for name, parameter in assembly.parameters.items():
        state = {"momentum_buffer"} if is_block_matrix(name, parameter) else {"exp_avg", "exp_avg_sq"}
        assert ours.state()[name].keys() == {*state, "main"}
        if is_block_matrix(name, parameter):
            parts = parameter_parts(parameter)
            theirs[name] = [nn.Parameter(part.of(ours.main[name]).clone()) for part in parts]
    torchs = {"momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw", **settings}
    muon = torch.optim.Muon([p for parts in theirs.values() for p in parts], lr=1e-2, weight_decay=0.1, **torchs)
    assert any(len(parts) == 3 for parts in theirs.values()) and len(theirs) == 8
    for number in range(3):
        for i, (name, parameter) in enumerate(assembly.parameters.items()):
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * number + i))
            assembly.gradients[parameter].copy_(gradient)
            for part, p in zip(parameter_parts(parameter), theirs.get(name, []), strict=name in theirs):
                p.grad = part.of(gradient) * 0.5**number
        ours.step(1e-2, 0.5**number)
        muon.step()
    for name, parts in theirs.items():
        assert torch.equal(ours.main[name], torch.cat([p.detach() for p in parts])), name
        assert torch.equal(assembly.parameters[name].detach(), ours.main[name].bfloat16())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 7), (5, 5)], ids=str)
def test_float32_products_are_near_those_of_float64(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wide = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    torch.testing.assert_close(orthogonal(matrix).double(), wide, rtol=0, atol=1e-5)
    singular = torch.linalg.svdvals(orthogonal(matrix))
    assert shape == (5, 5) or (singular.min() > 0.6 and singular.max() < 1.3)
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))
