"""Operands of attention within one tile of visible pairs, as views by head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fused_megatron.ops.visible_pairs import PairTile

TileDropout = Callable[[torch.Tensor, PairTile], torch.Tensor]
"""Maps probabilities [b, N, q, k] of a tile to the kept and rescaled ones; draws the same mask at each call."""


@dataclass(frozen=True)
class KernelDropout:
    """Dropout inside torch's attention kernel, which draws its own mask: no scores are stored on a GPU.

    Attributes:
        p: probability that an attention probability is dropped.
        seed: int of 63 bits; the same seed and shapes have the same mask.
    """

    p: float
    seed: int


@dataclass(frozen=True)
class Operands:
    """Query, key and value of an attention, or the rows of a tile of them.

    Attributes:
        query: [Sq, B, N, D]; of a tile [b, N, q, D].
        key: [Sk, B, G, D]; of a tile [b, G, k, D].
        value: [Sk, B, G, Dv]; of a tile [b, G, k, Dv].
        padding: [B, Sk] bool, True at keys that no query sees; of a tile [b, k]. None: no padding.
        scale: factor of the scores.
        dropout: for the probabilities; None: drop nothing.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    padding: torch.Tensor | None
    scale: float
    dropout: TileDropout | None

    def at(self, tile: PairTile) -> Operands:
        """Return the rows of a tile, as views."""
        return Operands(
            part_rows(self.query, tile.samples, tile.queries),
            part_rows(self.key, tile.samples, tile.keys),
            part_rows(self.value, tile.samples, tile.keys),
            None if self.padding is None else self.padding[slice(*tile.samples), slice(*tile.keys)],
            self.scale,
            self.dropout,
        )


@dataclass(frozen=True)
class Backward:
    """What a backward needs of the forward over all keys.

    Attributes:
        grad: gradient of the context, [Sq, B, N, Dv]; of a tile [b, N, q, Dv].
        context: as grad.
        log_sum_exp: [Sq, B, N], inf for rows without a key; of a tile [b, N, q].
    """

    grad: torch.Tensor
    context: torch.Tensor
    log_sum_exp: torch.Tensor

    def at(self, tile: PairTile) -> Backward:
        """Return the rows of a tile, as views."""
        return Backward(
            *(part_rows(t, tile.samples, tile.queries) for t in (self.grad, self.context, self.log_sum_exp))
        )


def part_rows(x: torch.Tensor, samples: tuple[int, int], rows: tuple[int, int]) -> torch.Tensor:
    """Return the view [b, heads, rows, ..] of x [S, B, heads, ..]."""
    return x[slice(*rows), slice(*samples)].movedim(0, 2)
