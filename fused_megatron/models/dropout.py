"""Dropout masks that are the same in every parallel layout.

The index of an element in the full tensor decides whether it is dropped, not the rank or the shard that holds it. A
dropout site is a point of the model that drops elements, such as "blocks.0.attention".
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fused_megatron import ops
from fused_megatron.checks import check
from fused_megatron.deprecation import renamed_names
from fused_megatron.ops.attention_operands import KernelDropout
from fused_megatron.ops.visible_pairs import PairTile
from fused_megatron.reference.philox import rows_of_random_words
from fused_megatron.sharding import SequenceLayout


@dataclass(frozen=True)
class BatchSlice:
    """The rows of a step's global batch in a microbatch; with the model's seed they decide what dropout drops.

    Attributes:
        step: number of the optimizer step.
        first_sample: index of the microbatch's first sample in the global batch of the step, over all data-parallel
            ranks and microbatches.
        global_batch_size: samples of the whole step.
    """

    step: int
    first_sample: int
    global_batch_size: int

    def __post_init__(self) -> None:
        check(self.step >= 0, f"step={self.step} must be 0 or more")
        check(
            0 <= self.first_sample < self.global_batch_size,
            f"first_sample={self.first_sample} must be in [0, global_batch_size={self.global_batch_size})",
        )


__getattr__ = renamed_names(__name__, {"BatchPosition": "BatchSlice"})


@dataclass(frozen=True)
class DropoutMasks:
    """Dropout masks of one microbatch at n dropout sites.

    Attributes:
        rng_states: [n, 2] int64, a row (seed of the site, step) for each site, on the device of the activations.
        batch_slice: rows of the global batch in the microbatch.
        sequence: positions of this rank's activations.
        seed: of the model, for masks that a kernel of torch draws.
        first_site: number of the first site in the model, 0 for the embedding.
    """

    rng_states: torch.Tensor
    batch_slice: BatchSlice
    sequence: SequenceLayout
    seed: int = 0
    first_site: int = 0

    def rows(self, start: int, stop: int) -> "DropoutMasks":
        """Return the masks of the sites start to stop."""
        return replace(self, rng_states=self.rng_states[start:stop], first_site=self.first_site + start)

    def in_kernel(self, which: int, p: float, first_head: int) -> KernelDropout:
        """Return the dropout of attention probabilities whose mask torch's kernel draws.

        Every site, step, microbatch and rank has another mask, and a recomputation has the same. The mask depends on
        the microbatch and on the rank's heads.

        Args:
            which: index of the dropout site.
            p: probability that a probability is dropped.
            first_head: index of this rank's first head.
        """
        site, batch = self.first_site + which, self.batch_slice
        return KernelDropout(
            p, dropout_seed(self.seed, f"kernel {site} {batch.step} {batch.first_sample} {first_head}")
        )

    def add(
        self, which: int, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float
    ) -> torch.Tensor:
        """Compute residual + dropout(x + bias).

        Args:
            which: index of the dropout site.
            x: [positions of the rank, B, H], a part of [S, global batch, H], whose mask is used.
            bias: [H] or None.
            residual: as x.
            p: probability that an element is dropped.
        """
        runs = self.sequence.runs
        if len(runs) == 1:
            return self._add_run(which, x, bias, residual, p, runs[0][1])
        parts = [self._add_run(which, x[rows], bias, residual[rows], p, start) for rows, start in runs]
        return torch.cat(parts)

    def _add_run(
        self, which: int, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float, start: int
    ) -> torch.Tensor:
        """Compute add() for rows at consecutive positions from `start` on."""
        return ops.bias_dropout_add(
            x,
            bias,
            residual,
            p,
            rng_state=self.rng_states[which],
            full_shape=(self.sequence.seq_len, self.batch_slice.global_batch_size, x.shape[-1]),
            offset=(start, self.batch_slice.first_sample, 0),
        )

    def drop(self, which: int, x: torch.Tensor, p: float) -> torch.Tensor:
        """Compute dropout(x); arguments as in add()."""
        return self.add(which, x, None, torch.zeros_like(x), p)

    def drop_heads(
        self, probabilities: torch.Tensor, tile: PairTile, *, which: int, p: float, first_head: int, heads: int
    ) -> torch.Tensor:
        """Compute the dropout of attention probabilities.

        Args:
            probabilities: [b, N / R, q, k], a part of [global batch, N, S, S], whose mask is used.
            tile: the samples of the microbatch, and the positions of the queries and keys.
            which: index of the dropout site.
            p: probability that an element is dropped.
            first_head: index of this rank's first head.
            heads: N.
        """
        parts = []
        # One call for each sample: a call takes rows that are cut along two dims, here heads and queries.
        for sample, part in enumerate(probabilities.split(1), tile.samples[0]):
            first = (self.batch_slice.first_sample + sample, first_head, tile.query_position, tile.key_position)
            full_shape = (self.batch_slice.global_batch_size, heads, *(self.sequence.seq_len,) * 2)
            state = self.rng_states[which]
            parts.append(
                ops.bias_dropout_add(
                    part, None, torch.zeros_like(part), p, rng_state=state, full_shape=full_shape, offset=first
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def uniform(self, which: int, sequence: SequenceLayout, shape: Sequence[int]) -> torch.Tensor:
        """Return random numbers in [0, 1), float32, for a part of [S, global batch, H].

        Args:
            which: index of the site.
            sequence: positions of the part.
            shape: [positions, B, H] of the part.
        """
        _, batch, width = shape
        state = self.rng_states[which]
        samples = self.batch_slice.first_sample + torch.arange(batch, device=state.device)
        positions = sequence.positions(state.device)
        rows = positions[:, None] * self.batch_slice.global_batch_size + samples
        words = rows_of_random_words(state, rows.flatten() * width, width)
        # 24 bits, which a float32 holds exactly: 32 bits could be rounded up to 1.
        return ((words >> 8).float() * 2.0**-24).view(*shape)


def dropout_seed(seed: int, name: str) -> int:
    """Return 63 random bits for the dropout site `name` of a model with this seed."""
    digest = hashlib.sha256(f"dropout {seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def fill_dropout_states_(states: torch.Tensor, sites: Sequence[str], seed: int) -> None:
    """Write a row (seed of the site, 0) for every dropout site into states, [n, 2] int64."""
    if not states.is_meta:
        states.copy_(torch.tensor([[dropout_seed(seed, site), 0] for site in sites]))


def masks_of_batch(
    states: torch.Tensor,
    batch_slice: BatchSlice | None,
    batch: int,
    sequence: SequenceLayout,
    *,
    seed: int = 0,
    first_site: int = 0,
) -> DropoutMasks:
    """Return the dropout masks of a model for one microbatch.

    Args:
        states: [n, 2] int64, filled by fill_dropout_states_.
        batch_slice: rows of the global batch in the microbatch.
        batch: B.
        sequence: positions of this rank's activations.
        seed, first_site: as in DropoutMasks.

    Raises:
        InputError: batch_slice is None, or ends beyond the global batch.
    """
    check(
        batch_slice is not None,
        "batch_slice=None must be given where the model drops elements in training, "
        "as batch_slice=BatchSlice(step, first_sample, global_batch_size) (or call eval())",
    )
    assert batch_slice is not None
    check(
        batch_slice.first_sample + batch <= batch_slice.global_batch_size,
        f"first_sample={batch_slice.first_sample} + tokens.shape[0]={batch} must be at most "
        f"global_batch_size={batch_slice.global_batch_size}",
    )
    states = states.clone()
    states[:, 1] = batch_slice.step
    return DropoutMasks(states, batch_slice, sequence, seed, first_site)
