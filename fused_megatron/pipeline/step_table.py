"""What the ranks of a pipeline tell each other before a step: the shapes that enter it, and whether all is well."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fused_megatron.checks import InputError
from fused_megatron.pipeline.faults import lost_peers, raise_alike


def shape_id(inputs: Sequence[torch.Tensor], kwargs: Mapping[str, Any]) -> int:
    """A number for all that shapes may follow from: shapes, dtypes, plain values, and whether gradients are made."""
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
    """One small collective before each step.

    Args:
        control: a group of all ranks of the pipeline on the CPU; None for one rank.
        store: where the text of an error is left for the others.
        rank, num_ranks: of the pipeline.
    """

    def __init__(self, control: dist.ProcessGroup | None, store: dist.Store | None, rank: int, num_ranks: int) -> None:
        self._control, self._store, self._rank, self._num_ranks = control, store, rank, num_ranks
        self._errors = 0

    def exchange(self, shape_ids: Sequence[int] | None, num_microbatches: int, error: InputError | None) -> list[int]:
        """The shape ids, which the rank of stage 0 gives, on every rank; or on every rank what is wrong on one.

        Raises:
            InputError: this rank's error, or that of the first other rank that has one.

        Communication: one all-reduce of 8 bytes a microbatch and rank.
        """
        if self._control is None or self._store is None:
            if error is not None:
                raise error
            return list(shape_ids or ())
        numbers = torch.zeros(num_microbatches + self._num_ranks, dtype=torch.int64)
        if error is not None:
            self._store.set(self._name(self._rank), str(error))
            numbers[num_microbatches + self._rank] = 1
        elif shape_ids is not None:
            numbers[:num_microbatches] = torch.tensor(shape_ids)
        with lost_peers():
            self._control.allreduce([numbers], dist.ReduceOp.SUM).wait()
        failed = [rank for rank in range(self._num_ranks) if numbers[num_microbatches + rank]]
        if failed:
            text = str(error) if error else f"rank {failed[0]}: {self._store.get(self._name(failed[0])).decode()}"
            self._errors += 1
            raise_alike(text, error)
        return [int(number) for number in numbers[:num_microbatches]]

    def close(self) -> None:
        """Let go of the group."""
        self._control = None

    def _name(self, rank: int) -> str:
        return f"input error {self._errors} of rank {rank}"
