"""Table that the ranks of a pipeline exchange before each step: shapes of its inputs, and errors of ranks."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from fused_megatron.checks import InputError, SharedInputError
from fused_megatron.observe.waits import COMMUNICATION, wait_for
from fused_megatron.pipeline.run.faults import lost_peers

_FAILED, _TRAINS = 1, 2  # bits of a rank's status


def shape_id(inputs: Sequence[torch.Tensor], kwargs: Mapping[str, Any]) -> int:
    """Return a hash of everything that shapes may depend on: shapes, dtypes, plain values, and gradients on or off."""
    text = repr((torch.is_grad_enabled(), _signature(tuple(inputs)), _signature(dict(kwargs))))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), str(value.dtype), value.requires_grad)
    if isinstance(value, Mapping):
        return [(str(key), _signature(value[key])) for key in value]
    if isinstance(value, list | tuple):
        return [_signature(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


class StepTable:
    """Exchange by one small collective at the start of each step, which runs while the first stage computes.

    Args:
        control: a group of all ranks of the pipeline on the CPU; None for one rank.
        store: store for the text of an error, which the other ranks read.
        rank: this rank of the pipeline.
        num_ranks: number of ranks of the pipeline.
    """

    def __init__(self, control: Any, store: dist.Store | None, rank: int, num_ranks: int) -> None:
        self._control, self._store, self._rank, self._num_ranks = control, store, rank, num_ranks
        self._work: Any = None
        self._numbers = np.zeros(0, dtype=np.int64)
        self._error: InputError | None = None
        self._shape_ids: list[int] | None = None
        self._num_errors = 0

    def start(
        self, shape_ids: Sequence[int] | None, num_microbatches: int, error: InputError | None, trains: bool = True
    ) -> None:
        """Start the exchange.

        Args:
            shape_ids: shape ids of the microbatches, on the rank of stage 0; None on other ranks.
            num_microbatches: number of microbatches of the step.
            error: error in the arguments of this rank; None if there is none.
            trains: False if a training step needs no gradient on this rank.

        Communication: one all-reduce of 8 bytes for each microbatch and each rank.
        """
        self._error, self._shape_ids = error, None
        self._numbers = numbers = np.zeros(num_microbatches + self._num_ranks, dtype=np.int64)
        if shape_ids is not None:
            numbers[:num_microbatches] = shape_ids
        numbers[num_microbatches + self._rank] = _TRAINS * trains + _FAILED * (error is not None)
        if self._control is not None and self._store is not None:
            if error is not None:
                self._store.set(self._name(self._rank), str(error))
            with lost_peers():
                self._work = self._control.allreduce([torch.from_numpy(numbers)], dist.ReduceOp.SUM)

    def shape_ids(self) -> list[int]:
        """Wait for the exchange, and return the shape ids, on every rank.

        Raises:
            SharedInputError: on every rank: an argument of some rank is wrong, or no rank needs a gradient.
        """
        if self._shape_ids is None:
            work, self._work = self._work, None
            try:
                if work is not None:
                    with lost_peers():
                        wait_for(COMMUNICATION, lambda: work.wait())
            finally:
                del work  # otherwise the traceback of an error would keep the connections open
            of_ranks = self._numbers[-self._num_ranks :]
            failed = np.flatnonzero(of_ranks & _FAILED)
            if len(failed):
                self._raise(int(failed[0]))
            if not of_ranks.any():
                raise SharedInputError(
                    "no parameter of any stage requires a gradient, and no input: there is nothing to train (unfreeze "
                    "some with requires_grad_(), or call evaluate())"
                )
            self._shape_ids = self._numbers[: -self._num_ranks].tolist()
        return self._shape_ids

    def _raise(self, rank: int) -> NoReturn:
        text = str(self._error)
        if self._error is None:
            assert self._store is not None
            text = f"rank {rank}: {self._store.get(self._name(rank)).decode()}"
        self._num_errors += 1
        raise SharedInputError(text) from self._error

    def close(self) -> None:
        """Release the control group."""
        self._control = self._work = None

    def _name(self, rank: int) -> str:
        return f"input error {self._num_errors} of rank {rank}"
