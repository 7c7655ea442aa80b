"""Start here when planning states other activations, transfers or memory of experts than a run has."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.planning.activation_memory import stage_activations
from fused_megatron.planning.dry_run import DryRun
from fused_megatron.planning.rank_communication import expert_communication
from fused_megatron.planning.rank_memory import rank_memory

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
    "all_gather": config_of({**EP, "expert_dispatch": "all_gather"}, **GATED),
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
    for block, formula in (
        ("blocks.0", stage_activations(config, one) - stage_activations(config, none)),
        ("blocks.1", stage_activations(config, both) - stage_activations(config, one)),
    ):
        assert kept[block] == pytest.approx(formula, rel=0.01), block
    assert report.sent_to_experts[0] == expert_communication(config, span)
    assert report.peak_bytes == pytest.approx(rank_memory(config).total, rel=0.15)


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
    report = DryRun(config).rank(0)
    assert report.num_parameters == rank_memory(config).num_parameters
    assert report.peak_bytes == pytest.approx(rank_memory(config).total, rel=0.1)
    (span,) = DryRun(config).spans
    assert report.sent_to_experts[0] == expert_communication(config, span)
