"""Start here when a config key of the parallel layout has no effect, or a wrong effect; a new key needs a line here."""

import dataclasses
from typing import Any

import torch

from fused_megatron.assembly.assemble import assemble
from fused_megatron.assembly.build import build_mesh, build_stages, stage_spans
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.testing.run_on_ranks import run_on_ranks

MODEL: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "seq_len": 12, "vocab_size": 300}
TRAINING = TrainingConfig(global_batch_size=8, microbatch_size=2)


def layout_facts(rank: int, world_size: int) -> dict[str, Any]:
    """Return the effect of each key of the layout, on four ranks."""

    def made(**changes: Any) -> tuple[TrainConfig, Any, Any]:
        model = {name.removeprefix("model."): value for name, value in changes.items() if "." in name}
        parallel = {name: value for name, value in changes.items() if "." not in name}
        config = TrainConfig(GPTConfig(**MODEL | model), ParallelConfig(**parallel), training=TRAINING)
        return config, build_mesh(config), plan_pipeline(config)

    found: dict[str, Any] = {}
    for name in ("tensor", "pipeline", "data", "context"):
        _, mesh, _ = made(**({"tensor_parallel_size": 2} if name == "data" else {}), **{f"{name}_parallel_size": 2})
        found[f"{name}_parallel_size"] = mesh.tp_size, mesh.pp_size, mesh.cp_size, mesh.dp_size
    changes = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}
    found["stages_per_rank"] = made(**changes, stages_per_rank=1)[2].num_stages
    config, _, plan = made(**changes, schedule="gpipe", pipeline_cut=(2, 0))
    found["schedule"] = plan.schedule(2).name
    found["pipeline_cut"] = [len(range(span.start, span.stop)) for span in stage_spans(config, plan)]
    for key, value in (("sequence_parallel", True), ("overlap", 2), ("context_parallel_method", "all_gather")):
        config, mesh, plan = made(tensor_parallel_size=4, **{key: value})
        stages = build_stages(config, mesh, plan, torch.device("cpu"))
        found[key] = getattr(next(iter(stages.stages.values())).layout, key)
    for key, value in (("zero_stage", 0), ("zero_shard_size", 2)):
        config, mesh, plan = made(**{key: value})
        stages = build_stages(config, mesh, plan, torch.device("cpu"))
        found[key] = assemble(config, mesh, plan, stages).gradients.replicas.dense.rows.num_shards
    found["zero_gather"] = made(zero_stage=3, zero_gather="step")[2].max_unsharded
    experts = {"expert_parallel_size": 2, "expert_tensor_parallel_size": 2, "expert_dispatch": "all_gather"}
    config, mesh, plan = made(**experts, **{"model.num_experts": 4})
    layout = next(iter(build_stages(config, mesh, plan, torch.device("cpu")).stages.values())).layout
    found |= {"expert_parallel_size": layout.ep_group.size(), "expert_dispatch": layout.expert_dispatch}
    found["expert_tensor_parallel_size"] = layout.etp_group.size()
    config, mesh, plan = made(**changes, timeout_s=7.0, scatter_messages=False)
    executor = assemble(config, mesh, plan, build_stages(config, mesh, plan, torch.device("cpu"))).executor
    found["timeout_s"] = executor._connections._control.options._timeout.total_seconds()
    found["scatter_messages"] = executor._loop._messages._parts.place
    return found


def test_keys_of_the_layout() -> None:
    expected = {
        "tensor_parallel_size": (2, 1, 1, 2),
        "pipeline_parallel_size": (1, 2, 1, 2),
        "data_parallel_size": (2, 1, 1, 2),
        "context_parallel_size": (1, 1, 2, 2),
        "context_parallel_method": "all_gather",
        "expert_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
        "expert_dispatch": "all_gather",
        "stages_per_rank": 2,
        "schedule": "gpipe",
        "pipeline_cut": [2, 0],
        "sequence_parallel": True,
        "overlap": 2,
        "zero_stage": 1,  # shard; 4 with the default
        "zero_shard_size": 2,
        "zero_gather": 1,  # stage at once; None with the default
        "timeout_s": 7.0,
        "scatter_messages": (0, 1),  # rank in the group, and its size; (tp_rank, 2) with the default
    }
    of_one_rank = {"steps_per_flush"}  # test_every_key.py
    assert expected.keys() | of_one_rank == {field.name for field in dataclasses.fields(ParallelConfig)}
    for found in run_on_ranks(layout_facts, 4, timeout_s=100):
        assert found == expected
