"""Start here when a model with experts has other gradients or weights in some layout."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fused_megatron.assembly.assemble import Assembly, assemble
from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.assembly.step_sums import sum_over_ranks
from fused_megatron.checkpoint import load_checkpoint, save_checkpoint
from fused_megatron.checkpoint.model_state import optimizer_boxes, parameter_boxes
from fused_megatron.config import GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.data.batch import Batch
from fused_megatron.sharding import TensorBox
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks

# Rows of the stacked experts that row shards cut in the middle of an expert, and unevenly on three ranks.
MODEL = GPTConfig(
    num_layers=2,
    hidden_size=20,
    num_heads=4,
    seq_len=12,
    vocab_size=29,
    ffn_hidden_size=28,
    activation="swiglu",
    linear_biases=False,
    num_experts=4,
    experts_per_token=2,
    expert_ffn_hidden_size=10,
    balance_loss=0.01,
)
CONFIG = TrainConfig(
    MODEL,
    optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.1),
    training=TrainingConfig(global_batch_size=48, microbatch_size=1, bucket_mb=0.002),
)
# eps keeps AdamW from making an update of the rounding of a tiny gradient.
EPS = {"adamw": {"eps": 1e-4}, "muon": {"eps": 1e-4}}
# Muon brings all singular values of a gradient near 1, and so enlarges its rounding.
TOLERANCE = {"muon": 1e-4}
NUM_STEPS = 3
CLIP = 0.2

Boxes = dict[str, tuple[tuple[slice, ...], torch.Tensor]]
"""For each full parameter the index of this rank's part, and its values."""


def config_of(
    layout: dict[str, Any], model: dict[str, Any], optimizer: str = "adamw", microbatches: int = 1
) -> TrainConfig:
    """A config whose ranks have some microbatches in a step of 48 samples."""
    parallel = ParallelConfig(**layout)
    samples = 48 // (microbatches * int(parallel.data_parallel_size or 1))
    return dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(MODEL, **model),
        parallel=parallel,
        optimizer=dataclasses.replace(CONFIG.optimizer, kind=optimizer, **EPS.get(optimizer, {})),
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


def tensor_boxes(assembly: Assembly) -> dict[str, TensorBox]:
    rows = assembly.replicas.rows
    weights = parameter_boxes(assembly.parameters, assembly.own_weights, rows)
    return {**weights, **optimizer_boxes(assembly.parameters, assembly.optimizer.state(), rows)}


def steps(
    rank: int, world_size: int, config: TrainConfig, folder: Path | None = None
) -> tuple[list[float], Boxes, Boxes]:
    """Train on random tokens with clipping, and save; return the norms, the first gradients and the last weights."""
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
    if folder is not None:
        save_checkpoint(folder, NUM_STEPS, tensor_boxes(assembly), state={}, group=dist.group.WORLD)
    return norms, gradients, boxes(assembly, assembly.optimizer.main)


def assert_near(found: Boxes, wanted: Boxes, tolerance: float) -> None:
    for name, (index, values) in found.items():
        full = wanted[name][1][index]
        limit = tolerance * max(float(wanted[name][1].abs().max()), 1e-3)
        torch.testing.assert_close(values, full, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}")


def loaded(rank: int, world_size: int, config: TrainConfig, folder: Path) -> Boxes:
    """Load the checkpoint of a folder; return the weights and the state of the optimizer."""
    assembly = assembled(config)
    found = tensor_boxes(assembly)
    for box in found.values():
        box.tensor.fill_(torch.nan)
    group = dist.group.WORLD if world_size > 1 else None
    load_checkpoint(folder / f"step-{NUM_STEPS:06d}", found, group=group)
    return {name: (box.box.slices(), box.tensor.detach().clone()) for name, box in found.items()}


def check_layouts(layouts: list[tuple[int, dict[str, Any], int]], model: dict[str, Any], optimizer: str) -> None:
    """Compare layouts (world size, layout, microbatches) with one process."""
    wanted_norms, wanted_gradients, wanted_weights = steps(0, 1, config_of({}, model, optimizer))
    assert min(wanted_norms[1::2]) > CLIP, "clipping must clip"
    for world_size in sorted({layout[0] for layout in layouts}):
        chosen = [(layout, count) for size, layout, count in layouts if size == world_size]
        cases = [(config_of(layout, model, optimizer, count),) for layout, count in chosen]
        for case, results in zip(chosen, run_cases_on_ranks(steps, world_size, cases), strict=True):
            for norms, gradients, weights in results:
                assert norms == pytest.approx(wanted_norms, rel=1e-6), case
                assert_near(gradients, wanted_gradients, 2e-6)
                assert_near(weights, wanted_weights, TOLERANCE.get(optimizer, 1e-5))
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


def sweep() -> Iterator[tuple[int, dict[str, Any], int]]:
    """Yield every way to fold experts over at most eight ranks, with the ZeRO stages and accumulations in turn."""
    grids = itertools.product((1, 2), (1, 2, 4), (1, 2), (1, 2), (1, 2, 4), (1, 2))
    for number, (tp, dp, cp, pp, ep, etp) in enumerate(grids):
        stage_ranks = tp * dp * cp
        if stage_ranks * pp > 8 or stage_ranks % (ep * etp) or pp * stage_ranks == 1:
            continue
        others: dict[str, Any] = {"context_parallel_size": cp, "pipeline_parallel_size": pp, "zero_stage": number % 4}
        others["sequence_parallel"] = tp > 1 and number % 3 > 0
        if number % 4 and dp == 4 and number % 5 > 2:
            others["zero_shard_size"] = 2
        yield stage_ranks * pp, layout_of(tp, ep, etp, dp, **others), (1, 4)[number // 4 % 2]


# World size, layout, microbatches of a step.
FAST = [
    (4, layout_of(tp=2, dp=2, zero_stage=0), 1),  # an expert's replicas are the ranks of dp and tp
    (4, layout_of(ep=2, etp=2, dp=4, zero_stage=3), 2),
    (4, layout_of(ep=4, tp=2, dp=2, zero_stage=2, sequence_parallel=True), 4),  # one replica of each expert
]
# A stage without experts; row shards that cut experts unevenly; groups of ranks that repeat the same state.
SLOW = [
    (4, layout_of(tp=2, dp=2, zero_stage=1), 1),
    (4, layout_of(ep=2, dp=2, pipeline_parallel_size=2, zero_stage=0), 2),
    (3, layout_of(dp=3), 1),
    (6, layout_of(tp=2, dp=3, zero_stage=2), 1),
    (4, layout_of(ep=2, dp=4, zero_stage=3, zero_shard_size=2), 2),
    (8, layout_of(ep=2, tp=2, dp=4, zero_stage=1, zero_shard_size=2), 1),
    (8, layout_of(tp=2, dp=4, zero_stage=2, zero_shard_size=2), 2),
]


def test_every_layout_of_experts_trains_as_one_process() -> None:
    check_layouts(FAST, {}, "adamw")


def test_active_parameters_are_those_of_the_experts_of_a_token() -> None:
    for changes, layers in (({}, 2), ({"moe_every": 2}, 1)):
        model = assembled(config_of({}, changes)).model
        # Two experts of four have no part in a token: three matrices each.
        assert model.num_parameters() - model.num_active_parameters() == layers * 2 * 3 * 20 * 10
    dense = assembled(config_of({}, {"num_experts": None, "balance_loss": 0.0, "expert_ffn_hidden_size": None})).model
    assert dense.num_active_parameters() == dense.num_parameters()


SAVED_AND_LOADED = [
    (4, layout_of(ep=4, tp=2, dp=2, zero_stage=2), 2, layout_of(etp=2, dp=2, zero_stage=3)),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            (4, layout_of(ep=2, dp=2, pipeline_parallel_size=2), 4, layout_of(ep=4, tp=2, dp=2, zero_stage=3)),
            (2, layout_of(tp=2), 8, layout_of(ep=2, etp=2, tp=2, dp=4, zero_stage=1, zero_shard_size=2)),
        ]
    ),
]


@pytest.mark.parametrize(("ranks", "layout", "others", "other_layout"), SAVED_AND_LOADED)
def test_a_checkpoint_fits_every_layout(
    tmp_path: Path, ranks: int, layout: dict[str, Any], others: int, other_layout: dict[str, Any]
) -> None:
    """One process loads what some ranks saved, and other ranks load the same bits."""
    run_cases_on_ranks(steps, ranks, [(config_of(layout, {}), tmp_path)])
    one = loaded(0, 1, config_of({}, {}), tmp_path)
    assert not any(values.isnan().any() for _, values in one.values())
    (results,) = run_cases_on_ranks(loaded, others, [(config_of(other_layout, {}), tmp_path)])
    assert {name for found in results for name in found} == one.keys()
    for found in results:
        for name, (index, values) in found.items():
            assert torch.equal(values, one[name][1][index]), name


@pytest.mark.slow
@pytest.mark.parametrize("index", range(4))
def test_sweep_of_layouts(index: int) -> None:
    check_layouts(list(sweep())[index::4], {}, "adamw")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "sgd", "lion", "adamw"])
def test_every_optimizer(optimizer: str) -> None:
    """Muon orthogonalizes each expert's matrices, on the ranks that share them."""
    check_layouts([*FAST, *SLOW], {"num_shared_experts": 1, "moe_every": 2}, optimizer)
