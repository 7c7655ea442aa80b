"""The mask of a context-parallel forward: what transformers' mask functions say, as numbers on the host."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fused_megatron.checks import InputError
from fused_megatron.sharding import SequencePartition

# Positions that the trial of a model looks at: its mask functions depend on nothing else, and hide no far key then.
_TRIAL_POSITIONS = 1 << 16


@dataclass(eq=False)
class ContextMask:
    """The mask that layers get in place of transformers' [B, 1, S, S].

    Attributes:
        batch, seq_len: B and S.
        causal: a query sees no later key.
        window: number of keys, up to and with its own, that a query sees; None: no limit.
        documents: [n + 1] int64 on the CPU, cumulative lengths of packed documents; None: one document a row.
        padding: [B, S] bool, True for keys that no query sees; None: no padding.
        partition: the positions of each rank; None until a layer asks for them.
    """

    batch: int
    seq_len: int
    causal: bool
    window: int | None
    documents: torch.Tensor | None
    padding: torch.Tensor | None
    partition: SequencePartition | None = None


def make_context_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> ContextMask:
    """Make the mask, as an entry of transformers' AttentionMaskInterface.

    A document starts where a query does not see the key before it. So packed documents are found as transformers finds
    them: by position_ids that start anew, without an attention_mask.

    Args:
        batch_size, q_length, kv_length: B, S, and S again.
        q_offset, kv_offset: 0: no tokens before these.
        mask_function: maps (sample, head, query, key) to whether the query sees the key; tensors that broadcast.
        attention_mask: [B, S] bool, False for padding.
        local_size: the sliding window.
        device: of the tensors that mask_function reads.

    Raises:
        InputError: the mask is neither causal nor bidirectional within documents, with or without a window; tokens
            before these.

    Communication: none; several copies to the host, if the mask is not plainly causal.
    """
    if q_length != kv_length or not _is_zero(q_offset) or not _is_zero(kv_offset):
        raise InputError(
            f"context parallelism: {kv_length} keys for {q_length} queries: no cache may hold tokens while gradients "
            "are recorded (use torch.no_grad())"
        )
    if local_size is not None and local_size < 2:
        raise InputError(f"context parallelism: sliding_window={local_size} must be at least 2")
    in_trial = torch.device(device).type == "meta"
    causal, starts = _found(mask_function, batch_size, q_length, local_size, "cpu" if in_trial else device, in_trial)
    documents = None
    if starts is not None:
        rows = [row * q_length + start for row, of_row in enumerate(starts) for start in of_row]
        documents = torch.tensor([*rows, batch_size * q_length])
    padding = None
    if attention_mask is not None and not bool(attention_mask.all()):
        padding = ~attention_mask.bool()
    return ContextMask(batch_size, q_length, causal, local_size, documents, padding)


def _is_zero(offset: Any) -> bool:
    return int(offset) == 0


def _found(
    mask_function: Any, batch: int, seq_len: int, window: int | None, device: Any, in_trial: bool
) -> tuple[bool, list[list[int]] | None]:
    """Return whether the mask is causal, and for each sample the starts of its documents; None: one document each."""
    masking_utils: Any = importlib.import_module("transformers.masking_utils")
    if mask_function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
        return mask_function is masking_utils.causal_mask_function, None

    samples = torch.arange(batch, device=device)[:, None]
    length = _TRIAL_POSITIONS if in_trial else seq_len

    def visible(queries: torch.Tensor, keys: torch.Tensor) -> npt.NDArray[np.bool_]:
        seen = mask_function(samples, torch.zeros_like(samples), queries[None], keys[None])
        found: npt.NDArray[np.bool_] = seen.broadcast_to(batch, len(keys)).cpu().numpy()
        return found

    positions = torch.arange(length, device=device)
    earlier, later = positions[:-1], positions[1:]
    ahead = visible(earlier, later)
    causal = not ahead.any()
    behind = visible(later, earlier)
    if in_trial and not behind.all():
        raise InputError(f"context parallelism: attention in chunks of {int(behind[0].argmin()) + 1} positions")
    starts = [[0, *(np.flatnonzero(~row) + 1).tolist()] for row in behind]
    for query in {length // 2, length - 1}:
        seen = visible(torch.full_like(positions, query), positions)
        if not _is_expected(seen, query, starts, causal, window):
            raise InputError(
                "context parallelism takes causal or bidirectional attention within documents, with or without a "
                f"causal window, but query {query} sees other keys"
            )
    return causal, None if behind.all() else starts


def _is_expected(
    seen: npt.NDArray[np.bool_], query: int, starts: list[list[int]], causal: bool, window: int | None
) -> bool:
    """Return whether a query sees the keys [B, S] that a causal or bidirectional mask shows in its document."""
    keys = np.arange(seen.shape[1])
    for row, of_row in zip(seen, starts, strict=True):
        first = max(start for start in of_row if start <= query)
        end = min((start for start in of_row if start > query), default=seen.shape[1])
        if causal:
            first, end = max(first, query + 1 - (window or query + 1)), query + 1
        elif window is not None:
            return False
        if not np.array_equal(row, (keys >= first) & (keys < end)):
            return False
    return True
