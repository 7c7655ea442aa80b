"""Documents in packed samples: their cumulative lengths, and the position of each token in its document."""

import torch

from fused_megatron.ops.visible_pairs import Visibility


def cumulative_lengths(starts: torch.Tensor) -> torch.Tensor:
    """Return the cumulative lengths of the documents of some samples, as in ops.attention.AttentionMask.

    Args:
        starts: [B, S] bool on the host, True at the first token of each document; True in the first column.

    Returns:
        [n + 1] int64 on the host: 0, the end of each of the n documents among the B S tokens (row after row), B S.
    """
    firsts = starts.flatten().nonzero().flatten()
    return torch.cat([firsts, firsts.new_full((1,), starts.numel())])


def positions_in_documents(starts: torch.Tensor) -> torch.Tensor:
    """Return the position of each token in its document, [B, S] int64; arguments as in cumulative_lengths."""
    columns = torch.arange(starts.shape[1])
    first = torch.where(starts, columns, 0).cummax(dim=1).values
    return columns - first


def num_visible_pairs(starts: torch.Tensor, window: int | None) -> int:
    """Count the (query, key) pairs that causal attention over these documents leaves visible.

    Args:
        starts: as in cumulative_lengths.
        window: number of keys, up to and with its own, that a query sees; None: no limit.
    """
    documents = cumulative_lengths(starts).tolist()
    visibility = Visibility.of_documents(True, window, documents, *starts.shape)
    return int(visibility.pairs_of_positions().sum())
