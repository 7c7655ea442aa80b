"""Attention over the keys that a causal, windowed, padding or document mask leaves visible."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fused_megatron.checks import InputError, check, check_dtype, check_shape
from fused_megatron.ops.scaled_masked_softmax import scaled_masked_softmax


@dataclass(frozen=True)
class AttentionMask:
    """The keys that each query may see: all keys that no part of the mask hides.

    Attributes:
        causal: hide the keys after the query.
        window: number of keys, up to and with the query's own, that a query sees; needs causal. None: no limit.
        key_padding_mask: [B, S] bool, True for keys that no query sees (as in torch); at least one key a row is False.
        documents: [n + 1] int32 or int64, from 0 to B S: cumulative lengths of the n documents that the B S tokens, row
            after row, consist of. A query sees only keys of its own document and row. None: each row is one document.
    """

    causal: bool = False
    window: int | None = None
    key_padding_mask: torch.Tensor | None = None
    documents: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check(self.window is None or self.causal, f"window={self.window} needs causal=True")
        check(self.window is None or self.window >= 1, f"window={self.window} must be at least 1 (None: no window)")

    def hidden(self, batch: int, seq_len: int) -> torch.Tensor | None:
        """Return [B, 1, S or 1, S] bool, True for keys hidden by key_padding_mask or documents; None without these."""
        found = None if self.key_padding_mask is None else self.key_padding_mask[:, None, None, :]
        if self.documents is None:
            return found
        tokens = torch.arange(batch * seq_len, device=self.documents.device)
        document = torch.searchsorted(self.documents, tokens.to(self.documents.dtype), right=True).view(batch, seq_len)
        apart = (document[:, :, None] != document[:, None, :]).unsqueeze(1)
        return apart if found is None else apart | found

    def seen(self, batch: int, seq_len: int, device: torch.device) -> torch.Tensor | None:
        """Return [S, S] or [B, 1, S or 1, S] bool, True where a query sees a key; None if `causal` is enough."""
        hidden = self.hidden(batch, seq_len)
        windowed = self.window is not None and self.window < seq_len
        if not windowed and (hidden is None or not self.causal):
            return None if hidden is None else ~hidden
        seen = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril()
        if windowed:
            seen = seen.triu(1 - (self.window or 0))
        return seen if hidden is None else seen & ~hidden


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionMask,
    *,
    scale: float | None = None,
    dropout: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute softmax(scale query key^T) value for each head, over the keys that the mask leaves visible.

    Equals torch.nn.functional.scaled_dot_product_attention (which it calls when there is no dropout) with the sequence
    as the first dim, the layout of the activations of this package.

    Args:
        query: [S, B, N, D] float, any strides.
        key: [S, B, G, D]; G divides N, and N / G neighbouring query heads share a key head.
        value: [S, B, G, Dv].
        mask: what each query sees.
        scale: factor of the scores; None: D^-0.5.
        dropout: maps the probabilities [B, N, S, S] to the kept and rescaled ones. It must draw the same mask when the
            backward recomputes it (as models/dropout.py does). None: no dropout.

    Returns:
        [S, B, N, Dv], dtype of query; a view of [B, N, S, Dv].

    Raises:
        InputError: shapes that do not fit, N that G does not divide, or cumulative lengths that do not ascend from 0 to
            B S (checked only on the CPU: on a GPU it would synchronise).
        TypeError: a key_padding_mask that is not bool, documents that are not integers.

    Communication: none.
    Memory: as torch's attention; a window below S, padding or documents need a mask of S S or B S S bytes. With dropout
        all scores and probabilities are stored: B N S S elements, and B N S S more after dropout.
    """
    _check_shapes(query, key, value, mask)
    seq_len, batch = query.shape[:2]
    shared = query.shape[2] // key.shape[2]
    query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    if dropout is None:
        seen = mask.seen(batch, seq_len, query.device)
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=seen,
            is_causal=mask.causal and seen is None,
            scale=scale,
            enable_gqa=shared > 1,
        )
        return context.permute(2, 0, 1, 3)
    if shared > 1:
        key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    hidden = mask.hidden(batch, seq_len)
    probabilities = scaled_masked_softmax(scores, hidden, scale=scale, causal=mask.causal, window=mask.window)
    return (dropout(probabilities) @ value).permute(2, 0, 1, 3)


def _check_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: AttentionMask) -> None:
    check(query.dim() == 4, f"query.shape={tuple(query.shape)} must be (S, B, N, D)")
    seq_len, batch, heads, head_dim = query.shape
    check(key.dim() == 4, f"key.shape={tuple(key.shape)} must be (S, B, G, D)")
    check_shape("key", key, (seq_len, batch, key.shape[2], head_dim))
    check_shape("value", value, (*key.shape[:3], value.shape[-1]))
    if key.shape[2] == 0 or heads % key.shape[2]:
        raise InputError(
            f"query.shape={tuple(query.shape)} has {heads} heads, not a multiple of the {key.shape[2]} of key"
        )
    if mask.key_padding_mask is not None:
        check_dtype("key_padding_mask", mask.key_padding_mask, (torch.bool,))
        check_shape("key_padding_mask", mask.key_padding_mask, (batch, seq_len))
    if mask.documents is not None:
        check_dtype("documents", mask.documents, (torch.int32, torch.int64))
        check(mask.documents.dim() == 1, f"documents.shape={tuple(mask.documents.shape)} must have 1 dim")
        if mask.documents.device.type == "cpu":
            lengths = mask.documents.tolist()
            check(
                lengths[:1] == [0] and lengths[-1] == batch * seq_len and lengths == sorted(lengths),
                f"documents={lengths} must be cumulative lengths from 0 to the {batch} x {seq_len} tokens",
            )
