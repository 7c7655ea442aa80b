"""Rows of an embedding whose vocabulary is sharded, and the gradient of this rank's rows, in plain PyTorch."""

import torch
import torch.nn.functional as F


def vocab_embedding_forward(
    ids: torch.Tensor, weight: torch.Tensor, first_row: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute torch.ops.fused_megatron.vocab_embedding_forward: (partial [.., H], local [..] int64).

    partial is the row of an id that this rank owns, 0 for ids of other ranks, and NaN for ids outside the vocabulary
    that no row of this rank has. local is the id's row in the shard, or the number of rows if the rank has no such row.
    """
    rows = weight.shape[0]
    local = ids.long() - first_row
    owned = (local >= 0) & (local < rows)
    other = torch.zeros((), dtype=weight.dtype, device=weight.device).where((ids >= 0) & (ids < vocab_size), torch.nan)
    local = local.where(owned, rows)
    partial = F.embedding(local.where(owned, 0), weight)
    return partial.where(owned.unsqueeze(-1), other.unsqueeze(-1)), local


def vocab_embedding_backward_(dy: torch.Tensor, local: torch.Tensor, total: torch.Tensor) -> None:
    """Compute torch.ops.fused_megatron.vocab_embedding_backward_: add the rows of dy to rows `local` of total.

    Row by row, in the order of the tokens, so that no gradient of the size of the table is made.
    """
    owned = (local < total.shape[0]).flatten().nonzero().squeeze(1)
    values = dy.reshape(-1, dy.shape[-1])[owned].to(total.dtype)
    total.index_add_(0, local.flatten()[owned], values)
