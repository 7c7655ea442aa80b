"""Run by test_presets.py: what ranks of any layout hold, keep and send, on meta tensors with a fake group of all ranks.

    python tests/layout_facts.py < configs.json           [{"model": {..}, "parallel": {..}, "training": {..}}, ..]

Prints for each, as JSON, by place in the pipeline (first, second, last) what facts() finds on a rank of that place.
"""

import dataclasses
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fused_megatron.assembly.model_stages import ModelStages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.mesh import Mesh, init_mesh
from fused_megatron.models import GPT, StageSpan, cut_stages
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.training.train import build_model

META = torch.device("meta")
known: dict[Any, Any] = {}


def config_of(sections: dict[str, dict[str, Any]]) -> TrainConfig:
    model, parallel, training = (sections[name] for name in ("model", "parallel", "training"))
    return TrainConfig(GPTConfig(**model), ParallelConfig(**parallel), training=TrainingConfig(**training))


def facts_of_places(config: TrainConfig) -> dict[int, Any]:
    parallel = config.parallel
    ranks_of_a_place = parallel.tensor_parallel_size * (parallel.data_parallel_size or 1)
    pp = parallel.pipeline_parallel_size
    found = {}
    for place in sorted({0, min(1, pp - 1), pp - 1}):
        rank = place * ranks_of_a_place + ranks_of_a_place // 2  # not the first of its data- and tensor-parallel group
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=pp * ranks_of_a_place)
        sizes = parallel.tensor_parallel_size, pp, parallel.data_parallel_size
        found[place] = facts(config, init_mesh(*sizes, device_type="cpu"))
        dist.destroy_process_group()
    return found


def facts(config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """groups; parameters: full and of this rank's shard; bytes of the gradients that are summed; stages by index."""
    plan = plan_pipeline(config)
    spans = cut_stages(config.model, plan.num_stages, config.parallel.pipeline_cut, placement=plan.placement)
    model = ModelStages(
        spans, plan.placement, mesh.pp_group, lambda span: build_model(config.model, mesh, config, META, span)
    )
    gradients = GradientBuckets({index: list(s.parameters()) for index, s in model.stages.items()}, mesh.dp_group)
    with record_communication() as ledger:
        gradients.finish()
    groups = (mesh.tp_group, mesh.pp_group, mesh.dp_group)
    return {
        "groups": [None if group is None else dist.get_process_group_ranks(group) for group in groups],
        "full": model.num_parameters(),
        "shard": sum(p.numel() for p in model.parameters_by_name().values()),
        "summed": ledger.num_bytes["all_reduce"],
        # With the ends that the stage has, and one block; and, without ends, of one block and of two: all are alike.
        "stages": {i: microbatch(config, mesh, 0 if spans[i].first else 1, spans[i].last, 1) for i in model.stages},
        "blocks": [microbatch(config, mesh, 1, False, blocks) for blocks in (1, 2)],
    }


def microbatch(config: TrainConfig, mesh: Mesh, start: int, last: bool, blocks: int) -> Any:
    """Forward and backward of a microbatch in a stage from block start on; the first one from 0."""
    few = StageSpan(start, start + (1 if last else 2), start, start + blocks)
    model = dataclasses.replace(config.model, num_layers=3)
    key = (model, config.training.dtype, config.training.microbatch_size, mesh.tp_size,
           config.parallel.sequence_parallel, few)  # fmt: skip
    if key not in known:  # no other part of the layout is seen from inside a stage
        known[key] = _microbatch(dataclasses.replace(config, model=model), mesh, few)
    return known[key]


def _microbatch(config: TrainConfig, mesh: Mesh, span: StageSpan) -> dict[str, Any]:
    stage: GPT = build_model(config.model, mesh, config, META, span)
    size, seq_len = config.training.microbatch_size, config.model.seq_len
    tokens = torch.zeros(size, seq_len, dtype=torch.int64, device=META)
    rows = seq_len // mesh.tp_size if config.parallel.sequence_parallel else seq_len
    x = torch.zeros(rows, size, config.model.hidden_size, dtype=next(stage.parameters()).dtype, device=META)
    x = tokens if span.first else x.requires_grad_()
    weights = {p.untyped_storage()._cdata for p in stage.parameters()}
    kept = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept[saved.untyped_storage()._cdata] = saved
        return saved

    with record_communication() as ledger:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            y = stage(x)
            given = list(y.shape)
            y = stage.loss(y, tokens, reduction="sum") if span.last else y
        y.backward(torch.empty_like(y))
    assert all(p.grad is not None and p.grad.shape == p.shape for p in stage.parameters())
    assert span.first or (x.grad is not None and x.grad.shape == x.shape)
    kept_bytes = sum(saved.untyped_storage().nbytes() for key, saved in kept.items() if key not in weights)
    return {"sent": dict(ledger.num_bytes), "kept": kept_bytes, "given": given}


if __name__ == "__main__":
    print(json.dumps([facts_of_places(config_of(sections)) for sections in json.load(sys.stdin)]))
