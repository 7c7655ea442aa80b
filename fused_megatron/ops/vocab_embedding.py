"""Rows of an embedding whose vocabulary is sharded: one kernel forward, and one sum into the gradient backward."""

from typing import Any

import torch

from fused_megatron.ops.registration import define_op, register_triton
from fused_megatron.reference import vocab_embedding as reference


def _fake_forward(
    ids: torch.Tensor, weight: torch.Tensor, first_row: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return weight.new_empty((*ids.shape, weight.shape[1])), ids.new_empty(ids.shape, dtype=torch.int64)


def _fake_backward(*_: Any) -> None:
    return None


_forward = define_op(
    "vocab_embedding_forward(Tensor ids, Tensor weight, int first_row, int vocab_size)"
    " -> (Tensor partial, Tensor local)",
    reference=reference.vocab_embedding_forward,
    fake=_fake_forward,
)
_backward_ = define_op(
    "vocab_embedding_backward_(Tensor dy, Tensor local, Tensor(a!) total) -> ()",
    reference=reference.vocab_embedding_backward_,
    fake=_fake_backward,
)
register_triton("vocab_embedding_forward", "vocab_embedding")
register_triton("vocab_embedding_backward_", "vocab_embedding")


def _has_kernel(x: torch.Tensor) -> bool:
    """Whether to call the op: not on a CPU, where a few ops of torch are as fast, nor in float64."""
    return not (x.is_cpu and _CPU_IS_PLAIN) and x.dtype != torch.float64


# Triton's interpreter takes the place of the GPU in its tests.
_CPU_IS_PLAIN = not torch._C._dispatch_has_kernel_for_dispatch_key("fused_megatron::vocab_embedding_forward", "CPU")


def vocab_embedding(
    ids: torch.Tensor, weight: torch.Tensor, *, first_row: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Look up the rows of a shard of an embedding; the sum of the results of all ranks is the embedding.

    Args:
        ids: [..] int64 or int32.
        weight: [V / R, H] float: rows first_row to first_row + V / R of the table.
        first_row: of the shard.
        vocab_size: size of the vocabulary without padding.

    Returns:
        (partial, local). partial [.., H], dtype of weight, contiguous: the row of an id that the shard has; else 0, or
        NaN for an id outside [0, vocab_size). local [..] int64: the id's row in the shard, or V / R without one.

    Communication: none.
    Memory: on a GPU reads each owned row and writes each result once.
    """
    find = _forward if _has_kernel(weight) else reference.vocab_embedding_forward
    partial, local = find(ids, weight, first_row, vocab_size)
    return partial, local


def add_embedding_gradient_(dy: torch.Tensor, local: torch.Tensor, total: torch.Tensor) -> None:
    """Add the gradient of a shard of an embedding to total: total[local[i]] += dy[i].

    Args:
        dy: [.., H] float.
        local: [..] int64, as vocab_embedding returns it; rows outside total are skipped.
        total: [V / R, H] float32 or float64.

    Communication: none.
    Memory: on a GPU the sorted rows, 16 bytes a token; each row of dy is read once, and each row of total that has a
        token is read and written once: nothing of the size of the table is made.
    Numerics: the tokens of a row are summed in float32 in their order, then added to total, so that runs agree bit for
        bit. A CPU adds them one after the other.
    """
    add = _backward_ if _has_kernel(total) else reference.vocab_embedding_backward_
    add(dy, local, total)
