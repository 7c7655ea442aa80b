"""Three recorded updates of a reduced config on this rank, with the trainer's own parts."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.assembly.assemble import assemble
from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.assembly.step_sums import sum_over_ranks
from fused_megatron.config import TrainConfig
from fused_megatron.data.batch import Batch
from fused_megatron.data.documents import positions_in_documents
from fused_megatron.mesh import Mesh, coordinates
from fused_megatron.models import TransformerStack
from fused_megatron.models.residual_stream import OpenSum, closed
from fused_megatron.modules.auxiliary_loss import split_auxiliary_loss
from fused_megatron.planning.verify.records import (
    GRADIENT,
    LOSS,
    NORM,
    OUTPUT,
    START,
    WEIGHT,
    Key,
    Piece,
    RankRecord,
    as_array,
    shard_places,
)
from fused_megatron.sharding import SequenceLayout, full_shape
from fused_megatron.sharding.gradient_norm import clip_coefficient

NUM_UPDATES = 3
IGNORED = -100
# Modules whose output is [S, B, H], or this rank's block of the sequence.
_SEEN = ("token_embedding", "embedding_norm", "final_norm", "head_transform", "head_norm")
_SEEN_IN_BLOCKS = ("", "attention_norm", "attention", "mlp_norm", "mlp")


def run_layout(rank: int, world_size: int, config: TrainConfig, rounded_to: torch.dtype | None = None) -> RankRecord:
    """Train for NUM_UPDATES steps and return every tensor. run_on_ranks calls it on every rank.

    Args:
        config: a config that takes seconds on a CPU, with model.vocab_size and the size of every mesh axis.
        rounded_to: round the weights to this dtype before the first step.

    Raises:
        InputError: as build_mesh, plan_pipeline and the model.

    Communication: as the trainer's steps.
    """
    device = torch.device("cpu")
    mesh, plan = build_mesh(config, device.type), plan_pipeline(config)
    model = build_stages(config, mesh, plan, device)
    parameters = model.parameters_by_name()
    move_vectors_(parameters)
    if rounded_to is not None:
        for parameter in parameters.values():
            parameter.data.copy_(parameter.data.to(rounded_to))
    record = RankRecord(coordinates(mesh.rank, {axis: size for axis, size in mesh.sizes.items() if size > 1}))
    assembly = assemble(config, mesh, plan, model)
    group = dist.group.WORLD if world_size > 1 else None
    for name, weight in assembly.whole(assembly.optimizer.main).items():
        record.add_parameter(Key(START, 0, name), parameters[name], weight)
    outputs = _OutputHooks(record, model.stages, config, mesh)
    for step in range(NUM_UPDATES):
        assembly.gradients.zero_()
        assembly.expert_loads.zero_()
        batch, num_targets = batch_of(config, step, mesh)
        loss_sum = assembly.accumulate_batch(batch, step, num_targets)
        outputs.remove()  # they record the first step only
        sums = sum_over_ranks(assembly, loss_sum, (), group)
        record.add_number(Key(LOSS, step + 1), sums.loss)
        gradients = assembly.whole(assembly.gradients.by_name(parameters))
        for name, gradient in reversed(gradients.items()):  # in the order of backward
            record.add_parameter(Key(GRADIENT, step + 1, name), parameters[name], gradient)
        record.add_number(Key(NORM, step + 1), sums.gradient_norm)
        assembly.update(config.optimizer.lr, clip_coefficient(sums.gradient_norm, config.optimizer.clip_norm))
        assembly.expert_loads.update(sums.expert_loads)
        for name, weight in assembly.whole(assembly.optimizer.main).items():
            record.add_parameter(Key(WEIGHT, step + 1, name), parameters[name], weight)
    assembly.executor.close()
    return record


@torch.no_grad()
def move_vectors_(parameters: Mapping[str, nn.Parameter]) -> None:
    """Move norms and biases away from 1 and 0, by the same values in every layout: 1 and 0 would hide a fault."""
    for name, parameter in parameters.items():
        if parameter.dim() == 1:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            full = 0.2 * torch.randn(full_shape(parameter), generator=generator)
            for _, mine, index in shard_places(parameter, parameter.data):
                mine.copy_(mine.float() + full[index])  # rounded once, in low precision


def batch_of(config: TrainConfig, step: int, mesh: Mesh) -> tuple[Batch, int]:
    """Return this data-parallel rank's rows of a random global batch, and the number of targets in all rows.

    Ignored targets are spread unevenly over samples and positions, and so over microbatches and ranks. One sample has
    no target.
    With data.mask_documents, documents of 5 tokens on average start at random.
    """
    model, rows = config.model, config.training.global_batch_size
    generator = torch.Generator().manual_seed(config.training.seed + step)
    shape = (rows, model.seq_len)
    assert model.vocab_size is not None
    inputs, targets = (torch.randint(model.vocab_size, shape, generator=generator) for _ in range(2))
    ignored_share = 0.1 + 0.8 * torch.arange(rows).unsqueeze(1) / rows
    # Falls by a convex curve: the first positions together with the last ignore more than the middle.
    ignored_share = ignored_share * (0.8 + 0.5 * (1 - torch.arange(model.seq_len) / model.seq_len) ** 3)
    ignored = torch.rand(shape, generator=generator) < ignored_share
    ignored[rows // 2 - 1] = True
    is_padding = None
    if model.traits.predicts == "masked_tokens":
        lengths = model.seq_len - torch.arange(rows) * 3 % 7 % model.seq_len
        is_padding = torch.arange(model.seq_len) >= lengths.unsqueeze(1)
        ignored |= is_padding
    starts = positions = None
    if config.data.mask_documents:
        starts = torch.rand(shape, generator=generator) < 0.2
        ignored[:, :-1] |= starts[:, 1:]
        starts[:, 0] = True
        positions = positions_in_documents(starts) if config.data.resets_positions else None
    targets = targets.masked_fill(ignored, IGNORED)
    count = rows // mesh.dp_size
    mine = slice(mesh.dp_rank * count, (mesh.dp_rank + 1) * count)
    parts = (None if part is None else part[mine] for part in (is_padding, starts, positions))
    return Batch(inputs[mine], targets[mine], *parts), int((~ignored).sum())


class _OutputHooks:
    """Hooks that record the outputs of modules in forward: a microbatch is a piece of the whole batch [S, B, H]."""

    def __init__(
        self, record: RankRecord, stages: Mapping[int, TransformerStack], config: TrainConfig, mesh: Mesh
    ) -> None:
        self._record, self._mesh = record, mesh
        self._sequence = self._whole = SequenceLayout.whole(config.model.seq_len)
        self._first_sample = 0
        self._done: set[tuple[str, int]] = set()
        self._handles: list[Any] = []
        for stage in stages.values():
            self._handles.append(stage.register_forward_pre_hook(self._begin, with_kwargs=True))
            for name, module in stage.named_modules():
                if _is_seen(name):
                    self._handles.append(module.register_forward_hook(partial(self._keep, name)))

    def remove(self) -> None:
        """Record no more."""
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, stage: nn.Module, inputs: Any, keywords: Mapping[str, Any]) -> None:
        self._first_sample = keywords["batch_slice"].first_sample
        partition = keywords.get("partition")
        self._sequence = self._whole if partition is None else partition.layouts[self._mesh.cp_rank]

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if (name, self._first_sample) in self._done:  # backward computes it again
            return
        self._done.add((name, self._first_sample))
        output, _ = split_auxiliary_loss(output)
        output = closed(output) if isinstance(output, OpenSum) else output
        y = output[0] if isinstance(output, tuple) else output  # the bias of a layer is added later
        sequence = self._sequence
        if y.shape[0] < sequence.num_positions:
            sequence = sequence.block(self._mesh.tp_rank, self._mesh.tp_size)
        samples = (self._first_sample, self._first_sample + y.shape[1])
        for rows, start in sequence.runs:
            part = y[rows]
            place = ((start, start + part.shape[0]), samples, (0, y.shape[2]))
            self._record.add(Key(OUTPUT, 1, name), Piece(as_array(part), place))


def _is_seen(name: str) -> bool:
    first, _, rest = name.partition(".")
    index, _, inner = rest.partition(".")
    return name in _SEEN or (first == "blocks" and index.isdigit() and inner in _SEEN_IN_BLOCKS)
