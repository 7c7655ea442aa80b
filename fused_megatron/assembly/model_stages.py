"""Container of the pipeline stages that a rank holds; with one pipeline rank, of the whole model."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.collectives import group_rank
from fused_megatron.models import StageSpan, TransformerStack
from fused_megatron.models.key_value_cache import KeyValueCache
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.sharding import full_numel, mark_all_shards, parameter_record


class ModelStages(nn.Module):
    """Pipeline stages of this rank, with parameters named as in the whole model, and the loss of the last stage.

    If one rank holds both the first and the last stage, they share the parameter of a tied embedding.

    Args:
        spans: the span of blocks of each pipeline stage.
        placement: the pipeline rank of each stage.
        pp_group: the pipeline's ranks; None: one rank.
        build: builds the stage of a span.

    Attributes:
        stages: this rank's stages, by index.
        config, vocab_size, tp_group, sequence_parallel: as in every stage.
    """

    def __init__(
        self,
        spans: Sequence[StageSpan],
        placement: Sequence[int],
        pp_group: dist.ProcessGroup | None,
        build: Callable[[StageSpan], TransformerStack],
    ) -> None:
        super().__init__()
        self.spans, self.placement, self.pp_group = tuple(spans), tuple(placement), pp_group
        rank = group_rank(pp_group)
        self.stages = {span.index: build(span) for span in spans if placement[span.index] == rank}
        first, last = self.stages.get(0), self.stages.get(len(spans) - 1)
        if first is not None and last is not None and last.token_embedding is not None:
            last.token_embedding = first.token_embedding
        self._modules_of_stages = nn.ModuleList(self.stages.values())  # for train(), eval()
        some = next(iter(self.stages.values()))
        self.config, self.vocab_size = some.config, some.vocab_size
        self.tp_group, self.sequence_parallel = some.tp_group, some.sequence_parallel

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Return this rank's parameters, each once, by their names in the whole model."""
        mark_all_shards(self)
        return {name: p for stage in self.stages.values() for name, p in stage.named_parameters()}

    def tied(self) -> list[dict[int, nn.Parameter]]:
        """Return the `tied` argument of PipelineExecutor: [{stage: tied weight}] for this rank, [] if none is tied."""
        if len(self.spans) == 1 or not self.config.tied_embeddings:
            return []
        ends = {i: stage for i, stage in self.stages.items() if i in (0, len(self.spans) - 1)}
        return [{i: stage.token_embedding.weight for i, stage in ends.items() if stage.token_embedding is not None}]

    def loss_sum(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the sum of the loss over a microbatch, 0-dim float64, from the output of the last stage."""
        return self.stages[len(self.spans) - 1].loss(hidden, target, reduction="sum")

    def attention_mask(self, **tensors: torch.Tensor) -> AttentionMask:
        """Return the attention mask of a microbatch; arguments as TransformerStack.attention_mask."""
        return next(iter(self.stages.values())).attention_mask(**tensors)

    def num_parameters(self) -> int:
        """Count the parameters of this rank's stages over all tensor-parallel ranks.

        The counts of all pipeline ranks add up to the count of the whole model.
        """
        return sum(stage.num_parameters() for stage in self.stages.values())

    def num_active_parameters(self) -> int:
        """Count as num_parameters, and of experts only as many as each token passes through."""
        if self.config.num_experts is None:
            return self.num_parameters()
        experts = full_numel(p for p in self.parameters_by_name().values() if parameter_record(p).experts is not None)
        unused = self.config.num_experts - self.config.experts_per_token
        return self.num_parameters() - experts * unused // self.config.num_experts

    def forward(self, tokens: torch.Tensor, *, cache: KeyValueCache | None = None) -> torch.Tensor:
        """Compute logits_shard [B, S, V_padded / R] of tokens [B, S] on every pipeline rank, without gradients.

        With a cache, which each rank has for its own blocks, only of each row's last new token, [B, 1, V_padded / R].

        Communication: for each stage two broadcasts over the pipeline ranks: the shape of its output, and the output.
        """
        x = tokens
        last = len(self.spans) - 1
        for index, owner in enumerate(self.placement):
            if index in self.stages:
                stage = self.stages[index]
                x = stage(x) if cache is None else stage(x, cache=cache)
                if index == last:
                    x = stage.logits(x) if cache is None else stage.next_logits(x, cache)
            x = self._broadcast_from(owner, x)
        return x

    def _broadcast_from(self, owner: int, x: torch.Tensor) -> torch.Tensor:
        """Return the 3-dim x of pipeline rank `owner` on every pipeline rank."""
        if self.pp_group is None:
            return x
        mine = owner == group_rank(self.pp_group)
        shape = torch.tensor(x.shape if mine else (0, 0, 0), dtype=torch.int64, device=x.device)
        dist.broadcast(shape, group_src=owner, group=self.pp_group)
        x = (
            x.contiguous()
            if mine
            else torch.empty(shape.tolist(), dtype=next(self.parameters()).dtype, device=x.device)
        )
        dist.broadcast(x, group_src=owner, group=self.pp_group)
        return x
