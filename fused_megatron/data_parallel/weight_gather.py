"""Gathering of weights that data-parallel ranks have updated by rows, during the next forward."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fused_megatron.collectives import meet
from fused_megatron.data_parallel.row_blocks import RowBlocks, by_dtype
from fused_megatron.data_parallel.weight_units import weight_units
from fused_megatron.sharding import Replicas, ReplicaSet


class WeightGather:
    """Makes parameters whole again after each rank has updated its rows: one all-gather for each bucket.

    start() starts to gather the first bucket. The forward of a module given to watch() waits for the buckets of its
    parameters. Each wait first starts the next bucket, which is gathered while the module computes.

    Args:
        buckets: parameters in the order in which forward uses them, the same on every replica. A bucket has parameters
            of the same replicas. Each dtype is sent separately.
        replicas: of the parameters, with the rows that this rank updates. Without ranks that update the other rows
            there is nothing to gather.
        hides: whether a parameter reads as NaN until it is whole.

    Communication:
        One all-gather of each bucket after each update, in the dtype of the parameters.

    Memory:
        Two buckets while a gather is under way.
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[nn.Parameter]],
        replicas: Replicas,
        hides: bool = False,
    ) -> None:
        self._rows, self._hides = replicas.rows, hides
        for each in replicas.sets:
            meet(each.shard_group)  # the ranks connect now, and not in a forward
        shared = [bucket for bucket in buckets if replicas.of(bucket[0]).shard_group is not None]
        self._buckets = [_Bucket(part, replicas.of(part[0])) for bucket in shared for part in by_dtype(bucket)]
        self._index = {p: i for i, bucket in enumerate(self._buckets) for p in bucket.parameters}
        self._done = self._started = len(self._buckets)

    def own(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the rows of a parameter that this rank updates, a view. Call start() after they have changed."""
        return self._rows.of(parameter).own(parameter.detach())

    def follow(self) -> None:
        """Gather into the memory that the parameters have now. All parameters must be whole."""
        for bucket in self._buckets:
            bucket.follow()

    def using(self, parameters: Iterable[nn.Parameter], function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that waits for all parameters before it runs."""

        def call(*arguments: Any, **options: Any) -> Any:
            self.finish()
            return function(*arguments, **options)

        return call

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Make all parameters whole. Every rank of the group must enter the context."""
        self.finish()
        yield

    def watch(self, module: nn.Module) -> None:
        """Make every forward of a module, of its children and of the members of its lists wait for their parameters."""
        for unit in weight_units(module):
            self._hook(unit.module, unit.parameters)

    def start(self) -> None:
        """Start a gather. This rank's rows have their new values, the other rows do not."""
        self.finish()
        self._done = self._started = 0
        self._send(1)
        for bucket in self._buckets if self._hides else ():
            bucket.hide()

    def finish(self) -> None:
        """Wait until every parameter is whole."""
        self._wait(len(self._buckets))

    def wait_for(self, parameters: Iterable[nn.Parameter]) -> None:
        """Wait until these parameters are whole. Every wait for a bucket first starts the next bucket."""
        self._wait(max((self._index[p] + 1 for p in parameters if p in self._index), default=0))

    def _hook(self, module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        waited = [p for p in parameters if p in self._index]
        if waited:
            module.register_forward_pre_hook(lambda *_: self.wait_for(waited), prepend=True)

    def _wait(self, end: int) -> None:
        while self._done < end:
            self._send(self._done + 2)
            self._buckets[self._done].finish()
            self._done += 1

    def _send(self, end: int) -> None:
        while self._started < min(end, len(self._buckets)):
            self._buckets[self._started].start()
            self._started += 1


class _Bucket:
    """Parameters that are gathered together."""

    def __init__(self, parameters: Sequence[nn.Parameter], replicas: ReplicaSet) -> None:
        self.parameters = tuple(parameters)
        self._whole = [p.detach() for p in parameters]
        self._is_hidden = False
        self._group = replicas.shard_group
        self._blocks = RowBlocks([p.shape for p in self.parameters], replicas.rows)
        self._wait: Callable[[], None] | None = None

    def follow(self) -> None:
        self._whole = [p.detach() for p in self.parameters]

    def start(self) -> None:
        assert self._group is not None
        self._wait = self._blocks.start_gather(self._whole, self._group)

    def hide(self) -> None:
        """Let the parameters read as NaN until finish()."""
        self._is_hidden = True
        absent = self._whole[0].new_full((), math.nan)
        for parameter in self.parameters:
            parameter.data = absent.expand(parameter.shape)

    def finish(self) -> None:
        assert self._wait is not None
        self._wait()
        self._wait = None
        for parameter, whole in zip(self.parameters, self._whole, strict=True) if self._is_hidden else ():
            parameter.data = whole
        self._is_hidden = False
