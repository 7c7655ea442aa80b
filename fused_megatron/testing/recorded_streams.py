"""A model of CUDA streams and events that finds races on a CPU, without a race having to occur."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_COLLECTIVES = ("all_reduce", "all_gather_single", "reduce_scatter_single", "all_to_all_single")
_ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


class Stream:
    """A queue of work. `seen` is, for every queue, the time up to which its work is before this queue's next work."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: dict[str, int] = {name: 0}

    def next(self) -> int:
        """Return the time of the next piece of work."""
        self.seen[self.name] += 1
        return self.seen[self.name]

    def record_event(self) -> dict[str, int]:
        """Return an event: the times up to which work is done once everything queued so far is done."""
        return dict(self.seen)

    def wait_event(self, event: dict[str, int]) -> None:
        """Order everything that is queued from now on after the event."""
        for name, time in event.items():
            self.seen[name] = max(self.seen.get(name, 0), time)


@dataclass
class Access:
    """One piece of work that reads or writes bytes [begin, end) of a storage."""

    begin: int
    end: int
    writes: bool
    stream: str
    time: int
    what: str


@dataclass
class Memory:
    """A storage and its accesses; `storage` is a weak reference."""

    storage: StorageWeakRef
    accesses: list[Access] = field(default_factory=list)


class RecordedWork:
    """Result of an asynchronous collective. It holds no buffer: the caller must keep the buffers alive."""

    def __init__(self, streams: "RecordedStreams", index: int, done: dict[str, int]) -> None:
        self._streams = streams
        self._index = index
        self._done = done

    def wait(self) -> bool:
        """Order the current stream's next work after the collective."""
        self._streams.wait(self._index, self._done)
        return True


class RecordedStreams(TorchDispatchMode):
    """Context manager that queues every op on the current stream and every collective on a stream of its own.

    Two collectives have no order, as with gloo. A collective waits, when it is issued, for an event of the current
    stream; in Work.wait() the current stream waits for an event of the collective. Nothing else orders the two. A race
    is: two accesses to the same bytes without an order, one of which writes; or memory that is freed while a collective
    may still use it.

    with RecordedStreams() as streams:
        step()
    assert streams.races == [] and streams.under_way == set()

    Args:
        without_wait: numbers of collectives whose Work.wait() does nothing, to show that a test finds the fault.
        without_start: numbers of collectives that do not wait for the current stream.

    Attributes:
        races: a line of text for each race.
        under_way: numbers of collectives that nothing has waited for.
        num_collectives: number of collectives issued with async_op=True.
    """

    def __init__(self, without_wait: Collection[int] = (), without_start: Collection[int] = ()) -> None:
        super().__init__()
        self.races: list[str] = []
        self.under_way: set[int] = set()
        self.num_collectives = 0
        self._without_wait = without_wait
        self._without_start = without_start
        self._current = Stream("current")
        self._memory: dict[int, Memory] = {}
        self._originals: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> "RecordedStreams":
        for name in _COLLECTIVES:
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, self._recorded(name))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for name, original in self._originals.items():
            setattr(dist, name, original)
        self._find_freed()

    def wait(self, index: int, done: dict[str, int]) -> None:
        """Wait for a collective; called by RecordedWork."""
        self._find_freed()
        self.under_way.discard(index)
        if index not in self._without_wait:
            self._current.wait_event(done)

    def _recorded(self, name: str) -> Callable[..., RecordedWork | None]:
        original = self._originals[name]

        def collective(*buffers: torch.Tensor, async_op: bool = False, **options: Any) -> RecordedWork | None:
            index = self.num_collectives
            stream = Stream(f"{name} {index}")
            if index not in self._without_start:
                stream.wait_event(self._current.record_event())
            time = stream.next()
            for i, buffer in enumerate(buffers):
                self._access(buffer, i == 0, stream, time, stream.name)
            original(*buffers, **options)
            if not async_op:
                self._current.wait_event(stream.record_event())
                return None
            self.num_collectives += 1
            self.under_way.add(index)
            return RecordedWork(self, index, stream.record_event())

        return collective

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._find_freed()
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        is_view = any(not alias.is_write for alias in aliases)
        if func.namespace == "c10d" or is_view or name in _ALLOCATIONS:
            return out
        time = self._current.next()
        for argument, value in _named(func._schema, args, kwargs):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for x in _tensors(value):
                self._access(x, writes, self._current, time, name)
        for x in [] if aliases else _tensors(out):
            self._access(x, True, self._current, time, name)
        return out

    def _access(self, x: torch.Tensor, writes: bool, stream: Stream, time: int, what: str) -> None:
        if x.numel() == 0:
            return
        storage = StorageWeakRef(x.untyped_storage())
        memory = self._memory.setdefault(storage.cdata, Memory(storage))
        begin = int(x.storage_offset()) * x.element_size()
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        mine = Access(begin, begin + (int(last) + 1) * x.element_size(), writes, stream.name, time, what)
        for other in memory.accesses:
            apart = other.end <= mine.begin or mine.end <= other.begin
            if apart or not (writes or other.writes) or stream.seen.get(other.stream, 0) >= other.time:
                continue
            did, does = ("wrote" if other.writes else "read"), ("writes" if writes else "reads")
            self.races.append(f"{what} {does} what {other.what} {did}, and no event orders the two")
        memory.accesses.append(mine)

    def _find_freed(self) -> None:
        """Record as a race all memory that was freed before the current stream waited for its accesses."""
        for key in [key for key, memory in self._memory.items() if memory.storage.expired()]:
            for access in self._memory.pop(key).accesses:
                if self._current.seen.get(access.stream, 0) < access.time:
                    self.races.append(f"memory of {access.what} was given back before it was done")


def _named(schema: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for i, argument in enumerate(schema.arguments):
        if i < len(args):
            yield argument, args[i]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
