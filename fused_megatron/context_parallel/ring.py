"""Attention over keys that go around a ring of ranks: the next ones travel under the attention over those at hand.

Each member of the ring sends its keys and values straight to every other member, and only the rows that this one
needs. In hop h, member r sends to member r + h and receives from member r - h. The transfer of hop h + 1 starts before
the attention of hop h, and is waited for after it. Own keys come first, so that the order of all sums is fixed.

Backward sends the keys and values again, so that a rank stores only its own. Their gradients go straight back to their
owner, under the attention of the next hop. One half of the attention over own keys comes first and the other half last,
so that the first keys and the last gradients travel under attention too.

    forward     attention of hop      0       1       2       3
                keys under it         1       2       3
    backward    attention of hop      0       1       2       3       0
                keys under it         1       2       3
                gradients under it                    1       2       3

Paper: Liu et al. 2023, Ring Attention with Blockwise Transformers (arXiv:2310.01889).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fused_megatron.collectives.exchanges import start_message
from fused_megatron.collectives.transfers import Transfer
from fused_megatron.context_parallel.attention_plan import Hop, Ranges
from fused_megatron.ops.attention_tiles import AttentionGradients, AttentionSum, sum_dtype
from fused_megatron.ops.visible_pairs import PairTile

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class RingKeys:
    """The keys and values of a member of a ring, and how they travel.

    Attributes:
        key: [own rows, B, G, D].
        value: [own rows, B, G, Dv].
        hops: the steps of the ring.
        group: process group of the ring's ranks, which may have others too; None for one rank.
        padding: returns the key_padding_mask [B, rows] of a rank of the ring and of ranges of its rows; None: no
            padding.
    """

    key: torch.Tensor
    value: torch.Tensor
    hops: Sequence[Hop]
    group: dist.ProcessGroup | None
    padding: Callable[[int, Ranges], torch.Tensor] | None = None

    def start(self, index: int) -> Transfer | None:
        """Start the messages with keys and values of a hop; None after the last hop."""
        if index >= len(self.hops):
            return None
        hop = self.hops[index]
        outgoing = _packed(self.key, self.value, hop.sent)
        return start_message((hop.target, outgoing), (hop.source, self._buffer(hop.received)), self.group)

    def start_gradients(self, index: int, gradients: Pair) -> Transfer:
        """Start to send the gradients of a hop's keys and values back, and to receive gradients of own rows."""
        hop = self.hops[index]
        outgoing = torch.cat([gradient.reshape(-1) for gradient in gradients])
        return start_message((hop.source, outgoing), (hop.target, self._buffer(hop.sent)), self.group)

    def unpacked(self, message: torch.Tensor) -> Pair:
        """Return the keys and the values in a message, as views."""
        _, batch, heads, _ = self.key.shape
        widths = [batch * heads * x.shape[-1] for x in (self.key, self.value)]
        rows = message.numel() // sum(widths)
        parts = message.split([rows * width for width in widths])
        key, value = (part.view(rows, batch, heads, -1) for part in parts) if rows else (self.key[:0], self.value[:0])
        return key, value

    def padding_of(self, index: int) -> torch.Tensor | None:
        """Return the key_padding_mask [B, rows] of the keys of a hop."""
        return None if self.padding is None else self.padding(self.hops[index].source, self.hops[index].received)

    def _buffer(self, rows: Ranges) -> torch.Tensor:
        width = self.key[0].numel() + self.value[0].numel()
        return self.key.new_empty(sum(stop - start for start, stop in rows) * width)


def _packed(key: torch.Tensor, value: torch.Tensor, rows: Ranges) -> torch.Tensor:
    """Return a message: the keys of these rows, then their values."""
    parts = [x[start:stop].reshape(-1) for x in (key, value) for start, stop in rows]
    return torch.cat(parts) if parts else key.new_empty(0)


def ring_forward(attention: AttentionSum, keys: RingKeys, spread: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Add the keys of all members of the ring to the attention of own queries.

    Args:
        attention: receives one block of keys for each hop.
        keys: own keys and values, and the hops.
        spread: maps keys or values [rows, B, G, D] to the heads that the attention takes.

    Communication: for each hop after the first, a message with the own rows that its target needs, keys and values.
    Memory: the keys and values of two messages, and a copy of the own rows that are sent.
    """
    own = keys.key, keys.value
    for index, hop in enumerate(keys.hops):
        following = keys.start(index + 1)
        attention.add(spread(own[0]), spread(own[1]), hop.tiles, keys.padding_of(index))
        if following is not None:
            own = keys.unpacked(following.wait())


def ring_backward(
    gradients: AttentionGradients,
    keys: RingKeys,
    own_halves: tuple[Sequence[PairTile], Sequence[PairTile]],
    spread: Callable[[torch.Tensor], torch.Tensor],
    gathered: Callable[[torch.Tensor], torch.Tensor],
) -> Pair:
    """Return the gradients of own keys and values, from the queries of all members of the ring.

    Args:
        gradients: receives one block of keys for each hop, and own keys twice.
        keys, spread: as in ring_forward.
        own_halves: tiles of own queries and own keys, to begin and to end with.
        gathered: maps gradients of spread(x) to gradients of x.

    Communication: the messages of ring_forward; and for each a message of the same size back, with the gradients in the
        dtype of the keys.
    Memory: the keys and values of two messages and their gradients, and the gradients of own rows in float32.
    """

    def attend(own: Pair, tiles: Sequence[PairTile], index: int) -> Pair:
        grad_key, grad_value = gradients.add(spread(own[0]), spread(own[1]), tiles, keys.padding_of(index))
        return gathered(grad_key), gathered(grad_value)

    own = keys.key, keys.value
    following = keys.start(1)
    found = attend(own, own_halves[0], 0)
    total = found[0].to(sum_dtype(found[0].dtype)), found[1].to(sum_dtype(found[1].dtype))
    returned: Transfer | None = None
    for index, hop in enumerate(keys.hops[1:], start=1):
        assert following is not None
        received = keys.unpacked(following.wait())
        following = keys.start(index + 1)
        found = attend(received, hop.tiles, index)
        _add_returned(total, keys, index - 1, returned)
        returned = keys.start_gradients(index, found)
    if own_halves[1]:
        for sums, part in zip(total, attend(own, own_halves[1], 0), strict=True):
            sums += part
    _add_returned(total, keys, len(keys.hops) - 1, returned)
    return total[0].to(keys.key.dtype), total[1].to(keys.value.dtype)


def _add_returned(total: Pair, keys: RingKeys, index: int, returned: Transfer | None) -> None:
    """Wait for the gradients that the target of a hop returns, and add them to the gradients of own rows."""
    if returned is None:
        return
    for sums, part in zip(total, keys.unpacked(returned.wait()), strict=True):
        row = 0
        for start, stop in keys.hops[index].sent:
            sums[start:stop] += part[row : row + stop - start]
            row += stop - start
