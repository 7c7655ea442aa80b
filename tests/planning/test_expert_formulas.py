"""Start here when planning states other activations, transfers or memory of experts than a run has."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.models.router import ExpertRouter
from fused_megatron.planning.dry_run import DryRun
from fused_megatron.planning.rank_communication import expert_communication
from fused_megatron.planning.rank_memory import rank_memory
from fused_megatron.planning.recorded_step import record_real_step
from fused_megatron.planning.step_profile import transfers_of
from fused_megatron.planning.working_memory import stage_bytes
from fused_megatron.testing import run_on_ranks

PRESETS = Path(__file__).parents[2] / "benchmarks" / "presets"
GATED = {"activation": "swiglu", "linear_biases": False}
EP = {"data_parallel_size": 4, "expert_parallel_size": 4}


def config_of(parallel: dict[str, Any], **form: Any) -> TrainConfig:
    model = GPTConfig(
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        seq_len=32,
        vocab_size=100,
        num_experts=8,
        expert_ffn_hidden_size=48,
        **form,
    )
    training = TrainingConfig(global_batch_size=8, microbatch_size=2, dtype="bfloat16")
    return TrainConfig(model, ParallelConfig(**parallel), training=training)


CASES = {
    "one rank": config_of({}, num_shared_experts=1, shared_expert_gate=True, **GATED),
    "ep=4": config_of(EP, recompute="full", recompute_blocks=1),
    "ep=2 etp=2": config_of({**EP, "expert_parallel_size": 2, "expert_tensor_parallel_size": 2}, experts_per_token=3),
    "tp=2 ep=4": config_of({**EP, "data_parallel_size": 2, "tensor_parallel_size": 2}, num_dense_layers=1),
    "all_gather": config_of({**EP, "expert_dispatch": "all_gather"}, recompute="full", recompute_blocks=1, **GATED),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("ep=4", "one rank") else pytest.mark.slow) for name in CASES]
)
def test_a_rank_keeps_and_sends_what_the_formulas_say(name: str) -> None:
    config = CASES[name]
    dry_run = DryRun(config)
    report, (span,) = dry_run.rank(0), dry_run.spans
    kept = {memory.layer: num_bytes for memory, num_bytes in report.kept[0].items()}
    one, none = (dataclasses.replace(span, num_stages=9, stop=stop) for stop in (1, 0))
    both = dataclasses.replace(span, num_stages=9, stop=2)
    # The norm after a layer of experts adds its result, so that the last norm keeps a sum that the formula counts in a
    # block.
    residual = 2 * config.training.microbatch_size * config.model.seq_len * config.model.hidden_size
    formulas = {
        "blocks.0": stage_bytes(config, one).kept - stage_bytes(config, none).kept,
        "blocks.1": stage_bytes(config, both).kept - stage_bytes(config, one).kept,
    }
    for block, formula in formulas.items():
        assert any(kept[block] == pytest.approx(formula - less, rel=0.01) for less in (0, residual)), block
    found = sum(kept[block] for block in formulas) + residual
    assert found == pytest.approx(sum(formulas.values()), rel=0.01)
    assert report.sent_to_experts[0] == expert_communication(config, span)
    assert report.peak_bytes == pytest.approx(rank_memory(config).total, rel=0.15)


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_parallel_size": 2, "sequence_parallel": True, "expert_parallel_size": 2},
        {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 2},
        pytest.param({}, marks=pytest.mark.slow),
    ],
    ids=["sp ep=2", "etp=2", "one rank"],
)
def test_weight_gradients_that_are_put_off(parallel: dict[str, Any]) -> None:
    """Most of a rank's memory is what its INPUT_GRAD actions keep for their WEIGHT_GRAD actions."""
    pipeline = {"pipeline_parallel_size": 2, "data_parallel_size": 2, "schedule": "zb_h1", "zero_stage": 1}
    base = config_of({**pipeline, **parallel}, num_shared_experts=1, **GATED)
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, num_layers=8, hidden_size=256, seq_len=1024, expert_ffn_hidden_size=512),
        training=dataclasses.replace(base.training, global_batch_size=32),
    )
    report = DryRun(config).rank(DryRun(config).world_size - 1)
    assert report.peak_bytes == pytest.approx(rank_memory(config, pp_rank=1).total, rel=0.06)


def test_the_worst_routes_send_every_token_to_a_rank() -> None:
    config = config_of({**EP, "expert_dispatch": "all_to_all"})
    balanced, worst = DryRun(config).rank(1), DryRun(config, routes="worst").rank(1)
    # Both experts of this rank take all tokens of the four ranks: four times the rows of balanced routes.
    ffn, hidden, size = 48, 64, 2
    more = 3 * 2 * 64 * (ffn + hidden) * size
    (kept, kept_at_worst) = (report.kept[0] for report in (balanced, worst))
    for memory, num_bytes in kept.items():
        if memory.layer.startswith("blocks"):
            assert more < kept_at_worst[memory] - num_bytes < 1.2 * more  # and the order of these rows
    assert worst.peak_bytes > balanced.peak_bytes


def choose_the_first_experts(model: nn.Module) -> None:
    """Set the weights of all routers to 0: a tie goes to the experts with the lowest indices."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ExpertRouter):
                module.weight.zero_()


def real_peak(rank: int, world_size: int, config: TrainConfig) -> tuple[int, dict[Any, Any]]:
    """Return the peak of a real step in which every token goes to the experts of rank 0, and the rank's transfers."""
    os.environ["FUSED_MEGATRON_SHARED_MEMORY"] = "off"
    step = record_real_step(config, torch.device("cpu"), choose_the_first_experts)
    work = step.work()
    mesh = step.assembly.mesh
    peak = step.recorder.storages.peak(step.assembled).num_bytes
    step.assembly.executor.close()
    return peak, transfers_of(work, mesh.sizes, mesh.expert_sizes)


@pytest.mark.parametrize("dispatch", ["all_to_all", pytest.param("all_gather", marks=pytest.mark.slow)])
def test_the_worst_routes_hold_in_a_run(dispatch: str) -> None:
    config = config_of({"data_parallel_size": 2, "expert_parallel_size": 2, "expert_dispatch": dispatch}, **GATED)
    ((peak, transfers), _) = run_on_ranks(real_peak, 2, config, timeout_s=300)
    worst = DryRun(config, routes="worst").rank(0)
    assert 0.95 * worst.peak_bytes <= peak <= 1.01 * worst.peak_bytes
    # A real run also tells every rank the numbers of rows: 8 (E + 2) bytes of 2 ranks, 2 layers and 2 microbatches.
    numbers = 2 * 2 * 2 * 8 * (8 + 2)
    for key, of_worst in worst.transfers.items():
        assert transfers[key].num_bytes == of_worst.num_bytes + numbers * (key == ("all_gather", "ep")), key


def test_routes_need_experts() -> None:
    dense = dataclasses.replace(config_of({}), model=GPTConfig(vocab_size=100))
    with pytest.raises(InputError, match="routes='worst' needs a model with experts"):
        DryRun(dense, routes="worst")
    with pytest.raises(InputError, match="routes='some' must be"):
        DryRun(dense, routes="some")


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(PRESETS.glob("moe_*.toml")), ids=lambda path: path.stem)
def test_a_preset_of_experts_runs_with_all_its_blocks(path: Path) -> None:
    config = load_config(path)
    dry_run = DryRun(config)
    report, (span,) = dry_run.rank(0), dry_run.spans
    memory = rank_memory(config)
    assert report.num_parameters == memory.num_parameters
    assert report.peak_bytes == pytest.approx(memory.total, rel=0.1)
    assert report.sent_to_experts[0] == expert_communication(config, span)
