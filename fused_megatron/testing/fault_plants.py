"""Faults of parallel training, as contexts that plant a fault into this process while they are open.

The faults are mistakes that are easy to make and raise no error: a sum that is missing or made twice, ranks in another
order, a rank that treats its part as the whole. A context replaces functions of the package and restores them when it
closes; the package itself has no switch. On one rank, or without the axis of a fault, most faults do nothing.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from fused_megatron.collectives import all_gather_reduce_scatter, group_size
from fused_megatron.collectives.transfers import Transfer, start_all_gather, start_reduce_scatter_blocks
from fused_megatron.data_parallel import gradient_bucket, reduction
from fused_megatron.data_parallel.optimizer import Optimizer
from fused_megatron.data_parallel.row_blocks import RowBlocks
from fused_megatron.data_parallel.weight_gather import WeightGather
from fused_megatron.models import attention, block, stack
from fused_megatron.models.dropout import DropoutMasks
from fused_megatron.ops import LossTerms, cross_entropy_shards
from fused_megatron.ops.visible_pairs import PairTile
from fused_megatron.overlap import overlapped_linear, overlapped_mlp
from fused_megatron.pipeline.run.executor import PipelineExecutor
from fused_megatron.pipeline.run.stage_compute import StageCompute
from fused_megatron.pipeline.run.tied_weights import TiedWeight
from fused_megatron.sharding import gradient_norm, initialization, parameter_parts, parameter_record
from fused_megatron.sharding.box import TensorBox
from fused_megatron.tensor_parallel import (
    RowParallelLinear,
    StackedColumnParallelLinear,
    embedding,
    layer_norm,
    linear,
    linear_cross_entropy,
)
from fused_megatron.tensor_parallel.cross_entropy import ShardExchange

Planted = AbstractContextManager[Any]


def _unsummed(x: torch.Tensor, group: Any) -> Transfer:
    """Return x as the result of an all-reduce, without communication."""
    return Transfer((), (x,))


def _as_given(tensors: tuple[torch.Tensor, ...], group: Any) -> tuple[torch.Tensor, ...]:
    """Return the parameters themselves, so that their gradients are not summed."""
    return tensors


# ---- Tensor parallelism ----------------------------------------------------------------------------------------------


def smoothing_by_the_local_vocabulary() -> Planted:
    """The mass of label smoothing is divided by the vocabulary size of a shard."""
    original = cross_entropy_shards.statistics_of_shard

    def statistics(logits: torch.Tensor, target: torch.Tensor, terms: LossTerms) -> torch.Tensor:
        stats: torch.Tensor = original(logits, target, terms)
        own = logits[:, : terms.num_real(logits.shape[1])].float()
        more = terms.label_smoothing * (1 / own.shape[1] - 1 / terms.vocab_size)
        stats[:, 2] -= more * (own - stats[:, :1]).sum(1)
        return stats

    return patch.object(cross_entropy_shards, "statistics_of_shard", statistics)


def input_gradient_not_summed() -> Planted:
    """The all-reduce of an input gradient is missing: each rank keeps its partial dx."""
    original = overlapped_linear.ColumnLinearFunction.backward

    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        with patch.object(overlapped_linear, "start_all_reduce_", _unsummed):
            return original(ctx, dy)

    return patch.object(overlapped_linear.ColumnLinearFunction, "backward", staticmethod(backward))


def gathered_gradient_summed() -> Planted:
    """A gather for identical computation on all ranks sums its gradient in backward: it counts once for every rank."""
    return patch.object(linear, "all_gather_split", all_gather_reduce_scatter)


def key_value_copies_not_summed() -> Planted:
    """Ranks that hold the same key-value head keep their own gradients of it."""

    def with_own_gradients(self: StackedColumnParallelLinear) -> Any:
        return self.weight, self.bias

    return patch.object(StackedColumnParallelLinear, "with_whole_gradients", with_own_gradients)


def head_norms_not_summed() -> Planted:
    """The gradients of the query and key norms, which every rank holds whole, are not summed over the ranks' heads."""
    return patch.object(attention, "used_by_parts", _as_given)


def padding_in_the_loss() -> Planted:
    """The rows that pad the vocabulary take part in the softmax."""

    def terms(vocab_size: int, *, vocab_start: int, **others: Any) -> LossTerms:
        padded = -(-vocab_size // 8) * 8 if vocab_start else vocab_size
        return LossTerms(padded, vocab_start=vocab_start, **others)

    return patch.object(linear_cross_entropy, "LossTerms", terms)


def embedding_not_summed() -> Planted:
    """Embeddings of tokens on other ranks stay 0."""
    return patch.object(embedding, "start_all_reduce_", _unsummed)


def head_gradient_not_summed() -> Planted:
    """Each rank passes on the gradient of its own part of the vocabulary."""

    def start(self: ShardExchange, partial: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: partial

    return patch.object(ShardExchange, "start_dhidden", start)


def bias_on_every_rank() -> Planted:
    """The bias of a row-parallel layer is added before the sum."""
    return patch.object(overlapped_linear, "of_first_rank", lambda bias, group: bias)


def weights_drawn_by_the_shard() -> Planted:
    """Every rank draws the first block of the full weight."""
    original = initialization._fill

    def fill(held: TensorBox, std: float, seed: int, name: str) -> None:
        original(TensorBox(held.tensor, held.full_shape, (0,) * len(held.offset)), std, seed, name)

    return patch.object(initialization, "_fill", fill)


def attention_dropout_by_the_local_head() -> Planted:
    """A rank's first head has the mask of the model's first head."""
    original = DropoutMasks.drop_heads

    def drop(self: DropoutMasks, x: torch.Tensor, tile: PairTile, **options: Any) -> torch.Tensor:
        return original(self, x, tile, **{**options, "first_head": 0})

    return patch.object(DropoutMasks, "drop_heads", drop)


# ---- Sequence parallelism --------------------------------------------------------------------------------------------


def norm_gradient_not_summed() -> Planted:
    """A norm on sequence shards keeps the gradient of its own block of the sequence."""
    return patch.object(layer_norm, "used_by_parts", _as_given)


def ranks_swapped_in_a_gather() -> Planted:
    """The blocks of a gathered sequence come in another order."""

    def start(x: torch.Tensor, dim: int, group: Any) -> Transfer:
        gathered = start_all_gather(x, dim, group).wait()
        return Transfer((), (torch.cat(gathered.chunk(group_size(group), dim)[::-1], dim),))

    return patch.object(overlapped_linear, "start_all_gather", start)


def positions_of_the_first_block() -> Planted:
    """Every block of the sequence gets the positions of the first."""
    return patch.object(stack, "split_all_gather", lambda x, dim, group: x.chunk(group_size(group), dim)[0])


def dropout_of_the_first_block() -> Planted:
    """Every block of the sequence has the dropout masks of the first."""
    original = stack.TransformerStack._own

    def own(self: stack.TransformerStack, sequence: Any) -> Any:
        found = original(self, sequence)
        return found if found == sequence else sequence.block(0, group_size(self.tp_group))

    return patch.object(stack.TransformerStack, "_own", own)


def output_bias_not_summed() -> Planted:
    """The bias that is added to a block of the sequence keeps the gradient of that block."""
    return patch.object(RowParallelLinear, "skipped_bias", lambda self: self.bias)


# ---- Overlap and recomputation ---------------------------------------------------------------------------------------


@contextmanager
def last_rows_lost() -> Iterator[None]:
    """Chunks have equal size, and the rows that remain are in no chunk."""

    def edges(length: int, num_chunks: int, multiple: int = 1) -> list[tuple[int, int]]:
        size = length // num_chunks
        return [(i * size, (i + 1) * size) for i in range(num_chunks)]

    with patch.object(overlapped_linear, "chunk_edges", edges), patch.object(overlapped_mlp, "chunk_edges", edges):
        yield


def recomputed_with_other_dropout() -> Planted:
    """A block that is computed again in backward draws new masks."""
    original = block.checkpoint

    def checkpoint(function: Any, *args: Any, dropout: Any = None, **keywords: Any) -> Any:
        calls = itertools.count()

        def again(*inputs: Any, **others: Any) -> Any:
            masks = dropout
            if next(calls) and masks is not None:
                masks = replace(masks, rng_states=masks.rng_states + 1)
            return function(*inputs, dropout=masks, **others)

        return original(again, *args, **keywords)

    return patch.object(block, "checkpoint", checkpoint)


# ---- Data parallelism and microbatches -------------------------------------------------------------------------------


def averaged_over_replicas() -> Planted:
    """Gradients are divided by the number of replicas, although the loss was divided by the targets of all replicas."""

    original = gradient_bucket.WholeBucket.start_sum

    def start_sum(self: gradient_bucket.WholeBucket) -> Callable[[], object]:
        self.flat.div_(group_size(self._replicas.group))
        return original(self)

    return patch.object(gradient_bucket.WholeBucket, "start_sum", start_sum)


def sent_a_microbatch_early() -> Planted:
    """A bucket is sent before the last microbatch has added to it."""
    original = reduction.GradientBuckets.reduce_after_backwards

    def announce(self: reduction.GradientBuckets, count: int) -> None:
        original(self, max(1, count - 1))

    return patch.object(reduction.GradientBuckets, "reduce_after_backwards", announce)


def last_bucket_not_sent() -> Planted:
    """The bucket that backward fills last is not summed: it keeps this replica's gradients."""
    original = reduction._Queue._send

    def send(self: Any, end: int) -> None:
        original(self, min(end, len(self.buckets) - 1))

    return patch.object(reduction._Queue, "_send", send)


def dropout_by_the_replica() -> Planted:
    """A replica counts its samples from 0, so that it has the dropout masks of the first replica."""
    original, first = stack.masks_of_batch, list[int]()

    def masks(states: torch.Tensor, batch_slice: Any, batch: int, sequence: Any) -> DropoutMasks:
        first.append(batch_slice.first_sample)
        moved = replace(batch_slice, first_sample=batch_slice.first_sample - first[0])
        return original(states, moved, batch, sequence)

    return patch.object(stack, "masks_of_batch", masks)


def divided_by_microbatches() -> Planted:
    """Gradients are averaged over microbatches, although the loss was divided by the targets of all microbatches."""
    original = PipelineExecutor.step

    def step(self: PipelineExecutor, inputs: Any, targets: Any, *, loss_divisor: float, **others: Any) -> Any:
        return len(inputs) * original(self, inputs, targets, loss_divisor=len(inputs) * loss_divisor, **others)

    return patch.object(PipelineExecutor, "step", step)


def targets_of_another_microbatch() -> Planted:
    """The last stage uses the targets of the previous microbatch."""
    original = PipelineExecutor.step

    def step(self: PipelineExecutor, inputs: Any, targets: Sequence[Any], **others: Any) -> Any:
        return original(self, inputs, [*targets[-1:], *targets[:-1]], **others)

    return patch.object(PipelineExecutor, "step", step)


# ---- Pipeline --------------------------------------------------------------------------------------------------------


def tied_gradient_twice() -> Planted:
    """The summed gradient of a tied weight counts twice: it is in both copies, which are added once more."""
    original = TiedWeight.reduce

    def reduce(self: TiedWeight) -> None:
        original(self)
        for parameter in self._parameters:
            summed = parameter_record(parameter).summed_grad
            assert summed is not None
            summed.mul_(2)

    return patch.object(TiedWeight, "reduce", reduce)


def tied_gradient_not_summed() -> Planted:
    """Each copy of a tied weight keeps the gradient of its stage."""
    return patch.object(TiedWeight, "reduce", lambda self: None)


def deferred_product_lost() -> Planted:
    """The deferred weight gradients of a split backward are not computed for the first microbatch."""
    original = StageCompute.weight_grad

    def weight_grad(self: StageCompute, microbatch: int) -> None:
        if microbatch == 0:
            self._products[microbatch].clear()
        original(self, microbatch)

    return patch.object(StageCompute, "weight_grad", weight_grad)


def handed_back_twice() -> Planted:
    """The gradient that a stage sends to the previous stage is doubled."""
    original = StageCompute.backward

    def backward(self: StageCompute, *args: Any, **keywords: Any) -> Any:
        return [None if x is None else 2 * x for x in original(self, *args, **keywords)]

    return patch.object(StageCompute, "backward", backward)


# ---- Norm, clipping, optimizer ---------------------------------------------------------------------------------------


def replicated_counted_by_every_rank() -> Planted:
    """The gradient norm counts replicated parameters once for every rank."""
    return patch.object(gradient_norm, "_counted", lambda parts, shape, rank: list(parts))


def _counted_on_the_first_rank() -> Planted:
    """Only the first rank adds to the norm that all ranks sum."""
    original = gradient_norm._counted
    return patch.object(gradient_norm, "_counted", lambda *args: original(*args) if dist.get_rank() == 0 else [])


def norm_of_one_shard() -> Planted:
    """The gradient norm counts only the shards of the first tensor-parallel rank."""
    return _counted_on_the_first_rank()


def norm_of_one_stage() -> Planted:
    """The gradient norm counts only the stages of the first pipeline rank."""
    return _counted_on_the_first_rank()


def norm_of_own_rows() -> Planted:
    """The gradient norm counts only the rows that the first replica updates."""
    return _counted_on_the_first_rank()


def weights_not_gathered() -> Planted:
    """Each replica updates its rows and keeps the old values of the others."""
    return patch.object(WeightGather, "start", lambda self: None)


def rows_of_another_replica() -> Planted:
    """The reduce-scatter of gradients gives each replica the sums that belong to the next one."""

    def start(blocks: torch.Tensor, shard: torch.Tensor, group: Any) -> Transfer:
        return start_reduce_scatter_blocks(blocks.roll(-shard.numel()), shard, group)

    return patch.object(gradient_bucket, "start_reduce_scatter_blocks", start)


def summed_in_bfloat16() -> Planted:
    """Gradients are rounded to bfloat16 before they are summed."""

    def start(blocks: torch.Tensor, shard: torch.Tensor, group: Any) -> Transfer:
        return start_reduce_scatter_blocks(blocks.bfloat16().float(), shard, group)

    return patch.object(gradient_bucket, "start_reduce_scatter_blocks", start)


def sharded_sums_averaged() -> Planted:
    """Sums of sharded gradients are divided by the number of shards, although the loss was divided by all targets."""

    def start(blocks: torch.Tensor, shard: torch.Tensor, group: Any) -> Transfer:
        return start_reduce_scatter_blocks(blocks / group_size(group), shard, group)

    return patch.object(gradient_bucket, "start_reduce_scatter_blocks", start)


def last_microbatch_kept() -> Planted:
    """The gradient sums of a microbatch replace the sums of earlier microbatches."""
    original = gradient_bucket.ShardedBucket.start_sum

    def start_sum(self: gradient_bucket.ShardedBucket) -> Callable[[], object]:
        wait = original(self)
        return lambda: (self._block.zero_(), wait())

    return patch.object(gradient_bucket.ShardedBucket, "start_sum", start_sum)


def copies_not_summed() -> Planted:
    """Replicas that repeat a state keep the gradients of their own shards."""
    return patch.object(reduction.GradientBuckets, "sum_copies", lambda self: None)


def weights_of_the_start_gathered() -> Planted:
    """Each forward and backward gathers the rows that the ranks had at the start."""
    original = RowBlocks.start_receive
    kept: dict[RowBlocks, torch.Tensor] = {}

    def start_receive(self: RowBlocks, block: torch.Tensor, group: Any) -> Callable[[], torch.Tensor]:
        return original(self, kept.setdefault(self, block.clone()), group)

    return patch.object(RowBlocks, "start_receive", start_receive)


def gathered_in_another_order() -> Planted:
    """Each gathered block of rows is taken for the block of the next replica."""
    original = RowBlocks.start_receive

    def start_receive(self: RowBlocks, block: torch.Tensor, group: Any) -> Callable[[], torch.Tensor]:
        receive = original(self, block, group)
        return lambda: receive().roll(1, 0)

    return patch.object(RowBlocks, "start_receive", start_receive)


def clipped_on_the_first_rank_only() -> Planted:
    """All ranks but the first update from unclipped gradients."""
    original = Optimizer.step

    def step(self: Optimizer, lr: float, gradient_scale: float = 1.0) -> None:
        original(self, lr, gradient_scale if dist.get_rank() == 0 else 1.0)

    return patch.object(Optimizer, "step", step)


@contextmanager
def sharded_biases_decayed() -> Iterator[None]:
    """Sharded biases get weight decay, as matrices do."""
    by_name, original = reduction.GradientBuckets.by_name, Optimizer._grouped
    sharded: set[str] = set()

    def remember(self: reduction.GradientBuckets, parameters: Any) -> Any:
        sharded.update(
            name
            for name, p in parameters.items()
            if p.dim() == 1 and not all(part.is_full(p.shape) for part in parameter_parts(p))
        )
        return by_name(self, parameters)

    def grouped(self: Optimizer, rules: Any, weight_decay: float) -> Any:
        found = []
        for group in original(self, rules, weight_decay):
            decayed = [name for name in group.names if name in sharded]
            found.append(group._replace(names=[name for name in group.names if name not in sharded]))
            found.append(group._replace(names=decayed, weight_decay=weight_decay))
        return [group for group in found if group.names]

    with (
        patch.object(reduction.GradientBuckets, "by_name", remember),
        patch.object(Optimizer, "_grouped", grouped),
    ):
        yield
