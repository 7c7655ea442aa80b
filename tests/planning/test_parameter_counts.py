"""Start here when planning counts other parameters than a rank has.

The counts of the formulas are compared with models built on the meta device, without values.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from fused_megatron.assembly.build import build_mesh, build_stages, stage_spans
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.planning.parameter_counts import ParameterCounts, stage_parameters
from fused_megatron.planning.recorded_step import fake_ranks
from fused_megatron.sharding import parameter_record

PRESETS = Path(__file__).parents[2] / "benchmarks" / "presets"
# Billions of parameters, by the number of experts.
EXPERTS = {64: 2.27, 128: 4.42, 256: 8.71}
FORMS: dict[str, dict[str, Any]] = {
    "dense": {"query_key_norm": True, "num_kv_heads": 2},
    "plain experts with biases": {"num_experts": 8, "expert_ffn_hidden_size": 24},
    "gated experts, some dense blocks": {
        "num_experts": 12,
        "activation": "swiglu",
        "linear_biases": False,
        "normalization": "rms_norm",
        "num_dense_layers": 1,
        "moe_every": 2,
        "num_shared_experts": 2,
        "shared_expert_gate": True,
        "expert_ffn_hidden_size": 32,
        "tied_embeddings": False,
        "router_bias_rate": 0.001,
    },
}
LAYOUTS: dict[str, dict[str, int]] = {
    "one rank": {},
    "tp=2": {"tensor_parallel_size": 2, "data_parallel_size": 1},
    "ep=2 etp=2": {"data_parallel_size": 4, "expert_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "tp=2 ep=4": {"tensor_parallel_size": 2, "data_parallel_size": 2, "expert_parallel_size": 4},
    "pp=2 cp=2 ep=2": {
        "pipeline_parallel_size": 2,
        "context_parallel_size": 2,
        "data_parallel_size": 1,
        "expert_parallel_size": 2,
    },
}


def counted(config: TrainConfig, rank: int) -> ParameterCounts:
    """Count the parameters of a rank's stages on the meta device."""
    ranks = config.parallel.num_ranks
    with fake_ranks(rank, ranks):
        stages = build_stages(config, build_mesh(config, "cpu"), plan_pipeline(config), torch.device("meta"))
        total = ParameterCounts()
        for name, parameter in stages.parameters_by_name().items():
            is_matrix = name.startswith("blocks.") and parameter.dim() == 2
            of_experts = parameter_record(parameter).experts is not None
            field = ("expert_" if of_experts else "") + ("matrices" if is_matrix else "others")
            total += ParameterCounts(**{field: parameter.numel()})
        return total


def formula(config: TrainConfig, pp_rank: int) -> ParameterCounts:
    plan = plan_pipeline(config)
    spans = [span for span, rank in zip(stage_spans(config, plan), plan.placement, strict=True) if rank == pp_rank]
    return sum((stage_parameters(config.model, span, config.parallel) for span in spans), ParameterCounts())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_are_those_of_the_model(form: str, layout: str) -> None:
    model = GPTConfig(num_layers=4, hidden_size=64, num_heads=4, seq_len=32, vocab_size=100, **FORMS[form])
    sizes = dict(LAYOUTS[layout])
    if form == "dense":
        sizes = {name: size for name, size in sizes.items() if "expert" not in name}
    config = TrainConfig(
        model, ParallelConfig(**sizes), training=TrainingConfig(global_batch_size=8, microbatch_size=2)
    )
    for pp_rank in range(config.parallel.pipeline_parallel_size):
        rank = (pp_rank + 1) * config.parallel.num_ranks // config.parallel.pipeline_parallel_size - 1
        assert counted(config, rank) == formula(config, pp_rank)


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_presets_have_the_number_of_parameters_that_they_state(num_experts: int) -> None:
    config = load_config(PRESETS / f"moe_{num_experts}_experts_dp8.toml")
    assert formula(config, 0).total / 1e9 == pytest.approx(EXPERTS[num_experts], rel=0.005)
