"""Start here when a model with experts has other gradients or weights in some layout."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fused_megatron.assembly.assemble import Assembly, assemble
from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.assembly.training_step import sum_over_ranks
from fused_megatron.config import GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.data.batch import Batch
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks

# Rows of the stacked experts that row shards cut in the middle of an expert, and unevenly on three ranks.
MODEL = GPTConfig(
    num_layers=2, hidden_size=20, num_heads=4, seq_len=12, vocab_size=29, ffn_hidden_size=28, activation="swiglu",
    linear_biases=False, num_experts=4, experts_per_token=2, expert_ffn_hidden_size=10, balance_loss=0.01,
)  # fmt: skip
CONFIG = TrainConfig(
    MODEL,
    # eps keeps AdamW from making an update of the rounding of a tiny gradient.
    optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.1, eps=1e-4),
    training=TrainingConfig(global_batch_size=8, microbatch_size=1, bucket_mb=0.002),
)
NUM_STEPS = 3
CLIP = 0.3

Boxes = dict[str, tuple[tuple[slice, ...], torch.Tensor]]
"""For each full parameter the index of this rank's part, and its values."""


def config_of(
    layout: dict[str, Any], model: dict[str, Any], optimizer: str = "adamw", microbatches: int = 1
) -> TrainConfig:
    """A config whose ranks have some microbatches in a step of eight samples."""
    parallel = ParallelConfig(**layout)
    samples = 8 // (microbatches * int(parallel.data_parallel_size or 1))
    return dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(MODEL, **model),
        parallel=parallel,
        optimizer=dataclasses.replace(CONFIG.optimizer, kind=optimizer),
        training=dataclasses.replace(CONFIG.training, microbatch_size=samples),
    )


def assembled(config: TrainConfig) -> Assembly:
    mesh, plan = build_mesh(config), plan_pipeline(config)
    return assemble(config, mesh, plan, build_stages(config, mesh, plan, torch.device("cpu")))


def boxes(assembly: Assembly, own: Mapping[str, torch.Tensor]) -> Boxes:
    """Cut the tensors of this rank into parts of full parameters."""
    found: Boxes = {}
    for name, values in own.items():
        parameter = assembly.parameters[name]
        for part in assembly.replicas.rows.of(parameter).own_parts(parameter):
            held = part.held(values)
            found[part.full_name(name)] = held.box.slices(), held.tensor.detach().clone()
    return found


def steps(rank: int, world_size: int, config: TrainConfig) -> tuple[list[float], Boxes, Boxes]:
    """Train on random tokens with clipping; return the norms, the first gradients and the last weights."""
    assembly, training, mesh = assembled(config), config.training, build_mesh(config)
    own = training.global_batch_size // mesh.dp_size
    norms, gradients = [], None
    for number in range(NUM_STEPS):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(29, (training.global_batch_size, config.model.seq_len + 1), generator=generator)
        rows = tokens[mesh.dp_rank * own : (mesh.dp_rank + 1) * own]
        assembly.gradients.zero_()
        assembly.expert_loads.zero_()
        batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss = assembly.accumulate_batch(batch, number, float(training.global_batch_size * config.model.seq_len))
        sums = sum_over_ranks(assembly, loss, (), dist.group.WORLD if mesh.world_size > 1 else None)
        if gradients is None:
            gradients = boxes(assembly, assembly.gradients.by_name(assembly.parameters))
        norms += [sums.loss, sums.gradient_norm]
        assembly.update(config.optimizer.lr, min(1.0, CLIP / sums.gradient_norm))
    assembly.weights.finish()
    assert assembly.find_drift() is None
    assert gradients is not None
    return norms, gradients, boxes(assembly, assembly.optimizer.main)


def assert_near(found: Boxes, wanted: Boxes, tolerance: float) -> None:
    for name, (index, values) in found.items():
        full = wanted[name][1]
        limit = tolerance * max(float(full.abs().max()), 1e-3)
        torch.testing.assert_close(values, full[index], rtol=0, atol=limit, msg=lambda text, name=name: name + text)


def check_layouts(layouts: list[tuple[int, dict[str, Any], int]], model: dict[str, Any], optimizer: str) -> None:
    """Compare layouts (world size, layout, microbatches) with one process."""
    ((one,),) = run_cases_on_ranks(steps, 1, [(config_of({}, model, optimizer),)])
    wanted_norms, wanted_gradients, wanted_weights = one
    assert min(wanted_norms[1::2]) > CLIP, "clipping must clip"
    for world_size in sorted({layout[0] for layout in layouts}):
        chosen = [(layout, count) for size, layout, count in layouts if size == world_size]
        cases = [(config_of(layout, model, optimizer, count),) for layout, count in chosen]
        for case, results in zip(chosen, run_cases_on_ranks(steps, world_size, cases), strict=True):
            for norms, gradients, weights in results:
                assert norms == pytest.approx(wanted_norms, rel=1e-6), case
                assert_near(gradients, wanted_gradients, 1e-6)
                assert_near(weights, wanted_weights, 1e-5)
            held = {name for _, gradients, _ in results for name in gradients}
            assert held == wanted_gradients.keys()


def layout_of(tp: int = 1, ep: int = 1, etp: int = 1, dp: int = 1, **others: Any) -> dict[str, Any]:
    return {
        "tensor_parallel_size": tp,
        "expert_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
        "data_parallel_size": dp,
        **others,
    }


# World size, layout, microbatches of a step.
FAST = [
    (4, layout_of(tp=2, dp=2, zero_stage=1), 1),  # an expert's replicas are the ranks of dp and tp
    (4, layout_of(ep=2, etp=2, dp=4, zero_stage=3), 2),
    (4, layout_of(ep=4, tp=2, dp=2, zero_stage=2, sequence_parallel=True), 4),  # one replica of each expert
    (4, layout_of(ep=2, dp=2, pipeline_parallel_size=2, zero_stage=0), 2),
]


def test_every_layout_of_experts_trains_as_one_process() -> None:
    check_layouts(FAST, {}, "adamw")
