"""Cache of the keys and values of tokens that a GPT has read."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F

from fused_megatron.checks import check
from fused_megatron.ops.attention import AttentionMask, attend
from fused_megatron.sharding import SequenceLayout


class KeyValueCache:
    """Keys and values of the tokens that a model has read, so that a further token costs a forward over one position.

    Sequences may have different lengths. The tokens of a forward are padded at their end: attention is causal, so that
    the padding reaches no token, and the next tokens take its place.

    Args:
        batch: number B of sequences.
        capacity: tokens of the longest sequence, with the tokens that come later and their padding.

    Attributes:
        lengths: number of kept tokens of each sequence.

    Communication: none; every rank has the keys and values of its blocks and heads.
    Memory: 2 B capacity D max(1, G / R) elements for each block of this rank.
    """

    def __init__(self, batch: int, capacity: int) -> None:
        self.capacity = capacity
        self.lengths = [0] * batch
        self._new, self._width = [0] * batch, 0
        self._is_even, self._longest = True, 0
        self._blocks: dict[str, BlockCache] = {}
        self._visible: torch.Tensor | None = None
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def begin(self, num_new: Sequence[int], width: int) -> None:
        """Announce the next forward: num_new[b] tokens of sequence b, at least 1, padded to `width` tokens."""
        # Once a forward, since each block asks for them.
        self._longest = max(self.lengths)
        self._is_even = min(self.lengths) == self._longest
        check(
            self._longest + width <= self.capacity,
            f"capacity={self.capacity} must hold {self._longest} tokens and {width} more",
        )
        self._new, self._width, self._visible = list(num_new), width, None

    def keep(self) -> None:
        """Keep the new tokens of the last forward. Without it, the next forward begins at the same position."""
        self.lengths = [old + new for old, new in zip(self.lengths, self._new, strict=True)]

    @property
    def is_even(self) -> bool:
        """Whether all sequences had the same number of kept tokens before the last begin()."""
        return self._is_even

    @property
    def longest(self) -> int:
        """Number of kept tokens of the longest sequence before the last begin()."""
        return self._longest

    def positions(self, longest: int, device: torch.device) -> tuple[SequenceLayout, torch.Tensor | None]:
        """Return the positions of the new tokens: the same for all sequences, or (second result) [B, width] int64.

        Args:
            longest: number of positions of the model; only padding may lie beyond.
            device: of the second result.
        """
        first, stop = self.lengths[0], self.lengths[0] + self._width
        if self.is_even and stop <= longest:
            return SequenceLayout(stop, ((first, stop),)), None
        return SequenceLayout.whole(self._width), self._query_positions(device).clamp(max=longest - 1)

    def rotary(
        self,
        tables: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        sequence: SequenceLayout,
        positions: torch.Tensor | None,
        device: torch.device,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of the new tokens, from tables of all positions that are made once.

        Args:
            tables: makes the tables of positions [1, S], [S, 1, Drot / 2] each.
            sequence, positions: as positions() returns them.
            device: of the tables.
        """
        if self._rotary is None:
            cos, sin = tables(torch.arange(self.capacity, device=device).unsqueeze(0))
            self._rotary = cos.squeeze(1), sin.squeeze(1)
        if positions is not None:
            cos, sin = (table[positions.t()] for table in self._rotary)
        else:
            cos, sin = (sequence.take(table) for table in self._rotary)
        return cos, sin

    def blocks(self, names: Iterable[str]) -> "list[BlockCache]":
        """Return the caches of the blocks with these names."""
        return [self._blocks.setdefault(name, BlockCache(self)) for name in names]

    def last(self, x: torch.Tensor) -> torch.Tensor:
        """Return the row of each sequence's last new token, [1, B, ..], from x [width, B, ..]."""
        if min(self._new) == max(self._new):
            return x[self._new[0] - 1 : self._new[0]]
        rows = torch.tensor(self._new, device=x.device) - 1
        return x[rows, torch.arange(x.shape[1], device=x.device)].unsqueeze(0)

    def visible(self, window: int | None, device: torch.device) -> torch.Tensor:
        """Return which keys each new token sees, [B, 1, width, longest sequence] bool; all blocks share it."""
        if self._visible is None:
            query = self._query_positions(device)[:, None, :, None]
            key = torch.arange(self._longest + self._width, device=device)
            self._visible = key <= query
            if window is not None:
                self._visible &= key > query - window
        return self._visible

    def new_slots(self, device: torch.device) -> slice | torch.Tensor:
        """Return the places of the new tokens in a sequence: a slice for all sequences, or [B, width] int64."""
        if self.is_even:
            return slice(self._longest, self._longest + self._width)
        return self._query_positions(device)

    def _query_positions(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.lengths, device=device)[:, None] + torch.arange(self._width, device=device)


class BlockCache:
    """Keys and values of one block.

    Args:
        cache: the cache of the model, which knows the lengths.
    """

    def __init__(self, cache: KeyValueCache) -> None:
        self._cache = cache
        self._keys = self._values = torch.empty(0)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
        """Keep the new keys and values; return the context [S, B, N, D] of the queries over all kept keys.

        Args:
            query: [S, B, N, D] of the new tokens, rotated.
            key, value: [S, B, G, D] of the new tokens; the key is rotated.
            mask: causal, with or without a window.
        """
        cache = self._cache
        self._store(key, value)
        if cache.longest == 0:
            return attend(query, key, value, mask)
        width, batch, heads, head_dim = query.shape
        stop = cache.longest + width
        first, visible = 0, None
        if width == 1 and cache.is_even:
            first = 0 if mask.window is None else max(0, stop - mask.window)
        else:
            visible = cache.visible(mask.window, query.device)
        keys, values = self._keys[:, :, first:stop], self._values[:, :, first:stop]
        groups = keys.shape[1]
        if width == 1:
            # The heads that share a key head take the place of the sequence: one small product less than enable_gqa.
            query = query.reshape(batch, groups, heads // groups, head_dim)
            context = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible)
            return context.reshape(1, batch, heads, -1)
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3), keys, values, attn_mask=visible, enable_gqa=heads > groups
        )
        return context.permute(2, 0, 1, 3)

    def _store(self, key: torch.Tensor, value: torch.Tensor) -> None:
        batch, groups = key.shape[1:3]
        if self._keys.numel() == 0:
            # Zeros: what a short sequence has not reached yet is masked, but 0 x NaN would still be NaN.
            self._keys = key.new_zeros(batch, groups, self._cache.capacity, key.shape[3])
            self._values = value.new_zeros(batch, groups, self._cache.capacity, value.shape[3])
        slots = self._cache.new_slots(key.device)
        for kept, new in ((self._keys, key), (self._values, value)):
            if isinstance(slots, slice):
                kept[:, :, slots] = new.permute(1, 2, 0, 3)
            else:
                kept[torch.arange(batch, device=key.device)[:, None], :, slots] = new.transpose(0, 1)
