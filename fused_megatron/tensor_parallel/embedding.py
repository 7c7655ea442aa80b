"""Embedding sharded over the vocabulary."""

from math import lcm
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fused_megatron.checks import InputError, check, check_divisible, check_dtype, check_same_device
from fused_megatron.collectives import Group, group_rank, group_size
from fused_megatron.collectives.transfers import start_all_gather, start_all_reduce_, start_reduce_scatter
from fused_megatron.ops.autograd_function import AutogradFunction
from fused_megatron.ops.vocab_embedding import add_embedding_gradient_, vocab_embedding
from fused_megatron.sharding import ParameterShard, ShardedModule, parameter_record
from fused_megatron.tensor_parallel.linear import draw_normal_weight_


class _VocabParallelEmbedding(AutogradFunction):
    op = "tensor_parallel.vocab_parallel_embedding"

    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, weight: torch.Tensor, vocab_size: int, sequence_dim: int | None, group: Group
    ) -> torch.Tensor:
        # This rank adds 0 for ids that it does not own, and NaN for ids outside the vocabulary: on a GPU, where a check
        # of the values would cost a synchronisation, the loss shows the mistake.
        rows = weight.shape[0]
        partial, local = vocab_embedding(ids, weight, first_row=group_rank(group) * rows, vocab_size=vocab_size)
        ctx.save_for_backward(local if ctx.needs_input_grad[1] else None)
        ctx.layout = rows, sequence_dim, group
        ctx.main_grad = parameter_record(weight).main_grad
        if sequence_dim is None:
            return start_all_reduce_(partial, group).wait()
        return start_reduce_scatter(partial, sequence_dim, group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (local,) = ctx.saved_tensors
        rows, sequence_dim, group = ctx.layout
        if local is None:
            return None, None, None, None, None
        if sequence_dim is not None:
            dy = start_all_gather(dy, sequence_dim, group).wait()
        if ctx.main_grad is not None:
            add_embedding_gradient_(dy, local, ctx.main_grad())
            return None, None, None, None, None
        # torch's CPU kernel sums repeated ids in the dtype of dy; its CUDA kernel sums in float32.
        wide = dy.float() if dy.is_cpu and dy.dtype in (torch.bfloat16, torch.float16) else dy
        # Ids of other ranks are `rows`, the padding index here, so the kernel skips them without a mask over dy.
        dweight = torch.ops.aten.embedding_dense_backward(wide.contiguous(), local, rows, rows, False)
        return None, dweight.to(dy.dtype), None, None, None


def vocab_parallel_embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    *,
    vocab_size: int,
    tp_group: Group,
    sequence_parallel: bool = False,
    sequence_dim: int = 0,
) -> torch.Tensor:
    """Look up rows of a table sharded over the vocabulary. Equals torch.nn.functional.embedding on one rank.

    w_shard_v   [V / R, H]
    forward     y [S, B, H] = sum over ranks of w_shard_v[ids - start] where owned; under sequence parallelism this
                rank's block [S / R, B, H] of y
    backward    dw_shard_v[i] = sum of dy where ids == start + i;  dy [S, B, H], gathered under sequence parallelism

    Args:
        ids: [...] int64 or int32; the same on every rank.
        weight: [V / R, H] float; V may include padding.
        vocab_size: size of the vocabulary without padding; ids must be below it.
        tp_group: the R ranks; None for this rank only.
        sequence_parallel: return this rank's block of sequence_dim.
        sequence_dim: the dim of ids that is the sequence.

    Returns:
        [..., H], dtype of weight, contiguous.

    Raises:
        InputError: an id outside [0, vocab_size), on the CPU (on a GPU a check would cost a synchronisation, and the
            row of such an id is NaN); a sequence that R does not divide; this rank not in tp_group.
        TypeError: ids that are no integers.

    Communication: one all-reduce of y forward, none backward; under sequence parallelism one reduce-scatter forward,
        one all-gather backward.
    Memory: ids are saved. If the weight has a main_grad, its gradient is added there, row by row.
    Numerics: repeated ids are summed in float32.
    """
    ranks = group_size(tp_group)
    check_dtype("ids", ids, (torch.int64, torch.int32))
    check_same_device("ids", ids, "weight", weight)
    check(
        weight.shape[0] * ranks >= vocab_size,
        f"weight.shape[0]={weight.shape[0]} x tensor_parallel_size={ranks} must be at least vocab_size={vocab_size}",
    )
    _check_ids(ids, vocab_size)
    dim = None
    if sequence_parallel and ranks > 1:
        check(
            -ids.dim() <= sequence_dim < ids.dim(),
            f"sequence_dim={sequence_dim} must be a dim of ids.shape={tuple(ids.shape)}",
        )
        dim = sequence_dim % ids.dim()
        check_divisible(f"sequence length ids.shape[{dim}]", ids.shape[dim], "tensor_parallel_size", ranks)
    return _VocabParallelEmbedding.apply(ids, weight, vocab_size, dim, tp_group)


def _check_ids(ids: torch.Tensor, vocab_size: int) -> None:
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    invalid = (ids < 0) | (ids >= vocab_size)
    if invalid.any():
        position = tuple(invalid.nonzero()[0].tolist())
        index = ", ".join(map(str, position))
        raise InputError(f"ids[{index}]={int(ids[position])} must be in [0, {vocab_size}), the size of the vocabulary")


class VocabParallelEmbedding(ShardedModule):
    """torch.nn.Embedding with the table [V, H] sharded over its rows.

    The vocabulary is padded with zero rows to a multiple of lcm(pad_to_multiple_of, R). The gradient of these rows is
    zero if the logits of a tied head go through vocab_parallel_cross_entropy, which ignores padding.

    Args:
        num_embeddings: V, the size of the vocabulary without padding.
        embedding_dim: H.
        tp_group: the R ranks; None for this rank only.
        sequence_parallel: return this rank's block [S / R, ...] of the sequence.
        sequence_dim: the dim of the ids that is the sequence.
        pad_to_multiple_of: the padded vocabulary is a multiple of this; 128 suits the matrix units of a tied head.
        init_std: standard deviation of the initial weight; the full weight is the same for every R.
        device, dtype: as torch.nn.Embedding.

    Attributes:
        padded_num_embeddings: size of the vocabulary with padding, over all ranks.

    Raises:
        InputError: sizes below 1, this rank is not in tp_group.

    Communication, Memory: as vocab_parallel_embedding.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        tp_group: Group,
        sequence_parallel: bool = False,
        sequence_dim: int = 0,
        pad_to_multiple_of: int = 128,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim}
        for name, size in {**sizes, "pad_to_multiple_of": pad_to_multiple_of}.items():
            check(size >= 1, f"{name}={size} must be at least 1")
        ranks = group_size(tp_group)
        multiple = lcm(pad_to_multiple_of, ranks)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padded_num_embeddings = -(-num_embeddings // multiple) * multiple
        self.tp_group = tp_group
        self.sequence_parallel, self.sequence_dim = sequence_parallel, sequence_dim
        self.init_std = init_std
        rows = self.padded_num_embeddings // ranks
        weight = nn.Parameter(torch.empty(rows, embedding_dim, device=device, dtype=dtype))
        shard = ParameterShard((num_embeddings, embedding_dim), (group_rank(tp_group) * rows, 0))
        self.register_shard("weight", weight, shard)
        self.reset_parameters()

    def reset_parameters(self, seed: int | None = None, name: str = "weight") -> None:
        """Draw the table from (seed, name), or from torch's CPU generator; padding rows become 0.

        Without a seed torch's CPU generator must have the same state on all ranks of tp_group (torch.manual_seed).
        """
        self.mark_shards()
        draw_normal_weight_(self.weight, self.init_std, seed, name)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up ids [...]; returns rows [..., H], or this rank's block of the sequence."""
        return vocab_parallel_embedding(
            ids,
            self.weight,
            vocab_size=self.num_embeddings,
            tp_group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            sequence_dim=self.sequence_dim,
        )

    def extra_repr(self) -> str:
        """Return the text for print(model)."""
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, padded_num_embeddings={self.padded_num_embeddings}, "
            f"tensor_parallel_size={group_size(self.tp_group)}, sequence_parallel={self.sequence_parallel}"
        )
