"""Dropout whose masks do not depend on the layout: every element's fate follows from its place in the whole tensor."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fused_megatron import ops
from fused_megatron.checks import check
from fused_megatron.deprecation import renamed_names
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
    """What a part of the model drops from one microbatch.

    Attributes:
        rng_states: [n, 2] int64 (seed of the place in the model, step), on the device of the activations.
        batch_slice: rows of the global batch in the microbatch.
        sequence: the positions of this rank's activations.
    """

    rng_states: torch.Tensor
    batch_slice: BatchSlice
    sequence: SequenceLayout

    def rows(self, start: int, stop: int) -> "DropoutMasks":
        """Those of the places start to stop."""
        return DropoutMasks(self.rng_states[start:stop], self.batch_slice, self.sequence)

    def add(
        self, which: int, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float
    ) -> torch.Tensor:
        """residual + dropout(x + bias), x [positions of the rank, B, H]; the mask is that of [S, global batch, H]."""
        runs = self.sequence.runs
        if len(runs) == 1:
            return self._add_run(which, x, bias, residual, p, runs[0][1])
        parts = [self._add_run(which, x[rows], bias, residual[rows], p, start) for rows, start in runs]
        return torch.cat(parts)

    def _add_run(
        self, which: int, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float, start: int
    ) -> torch.Tensor:
        """As add, of rows whose positions follow each other from `start` on."""
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
        """dropout(x), x [positions of the rank, B, H]."""
        return self.add(which, x, None, torch.zeros_like(x), p)

    def drop_heads(
        self, which: int, probabilities: torch.Tensor, p: float, first_head: int, heads: int
    ) -> torch.Tensor:
        """dropout of attention probabilities [B, N / R, Sq, Sk]; the mask is that of [global batch, N, Sq, Sk]."""
        return ops.bias_dropout_add(
            probabilities,
            None,
            torch.zeros_like(probabilities),
            p,
            rng_state=self.rng_states[which],
            full_shape=(self.batch_slice.global_batch_size, heads, *probabilities.shape[2:]),
            offset=(self.batch_slice.first_sample, first_head, 0, 0),
        )


def dropout_seed(seed: int, name: str) -> int:
    """63 bits for the place `name` of a model with this seed."""
    digest = hashlib.sha256(f"dropout {seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def fill_dropout_states_(states: torch.Tensor, places: Sequence[str], seed: int) -> None:
    """Make the places of a model draw from this seed: (seed of the place, 0) for each, [n, 2] int64."""
    if not states.is_meta:
        states.copy_(torch.tensor([[dropout_seed(seed, place), 0] for place in places]))


def masks_of_batch(
    states: torch.Tensor, batch_slice: BatchSlice | None, batch: int, sequence: SequenceLayout
) -> DropoutMasks:
    """What a model drops from a microbatch.

    Args:
        states: as fill_dropout_states_ filled them.
        batch_slice: rows of the global batch in the microbatch.
        batch: B.
        sequence: the positions of this rank's activations.

    Raises:
        InputError: no batch_slice, or one that leaves the global batch.
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
    return DropoutMasks(states, batch_slice, sequence)
