"""Log of the storages that ops allocate: their bytes, and where each is allocated and freed."""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.utils._pytree import tree_leaves

Label = TypeVar("Label", bound=Hashable)

RESIZE_STORAGE = torch.ops.inductor.resize_storage_bytes_.default
"""Op that frees or allocates the memory of a tensor to which others refer."""


class Storage(Generic[Label]):
    """A storage that was allocated while the log was active.

    Attributes:
        num_bytes: size of the storage.
        made: label of its allocation.
        freed: label of the moment when its last tensor was freed; None before.
    """

    __slots__ = ("alive", "freed", "made", "num_bytes")

    def __init__(self, num_bytes: int, made: Label) -> None:
        self.num_bytes, self.made = num_bytes, made
        self.alive = True
        self.freed: Label | None = None


class Event(NamedTuple):
    """The allocation (comes=True) or the end of a storage, and its label."""

    storage: Storage[Any]
    comes: bool
    where: Any


class Peak(NamedTuple):
    """The moment with the most allocated bytes.

    Attributes:
        num_bytes: bytes of all storages at that moment.
        where: label of the moment.
        storages: the storages that were alive.
    """

    num_bytes: int
    where: Any
    storages: list[Storage[Any]]


class StorageLog(Generic[Label]):
    """Log of every storage that an op returns, once per storage, for any number of tensors and views that share it.

    A TorchDispatchMode passes each op to see(). Works on real tensors and on fake tensors. Memory that a kernel uses
    only internally is not logged, nor memory that no op allocated.

    Args:
        where: returns the label of the current moment, for storages that are allocated or freed now.
    """

    def __init__(self, where: Callable[[], Label]) -> None:
        self._where = where
        # Other threads free storages too, for example a transport's after a message: appending to a list is atomic.
        self._events: list[Event] = []
        # By the address of torch's storage; the storage keeps its Python object while it is alive.
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._by_key: dict[int, Storage[Label]] = {}

    def see(self, func: Any, inputs: Any, result: Any) -> None:
        """Log the result of an op."""
        if func is RESIZE_STORAGE:
            self._see_resized(*inputs[0])
            return
        if isinstance(result, torch.Tensor):
            self._see_tensor(func, inputs, result)
        elif isinstance(result, list | tuple):
            for tensor in result:
                if isinstance(tensor, torch.Tensor):
                    self._see_tensor(func, inputs, tensor)

    def _see_tensor(self, func: Any, inputs: Any, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        # Skip views of, and writes to, an input. torch.tensor(..) calls lift_fresh on memory that it has just made.
        if func is not torch.ops.aten.lift_fresh.default and any(
            isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata == key for leaf in tree_leaves(inputs)
        ):
            return
        self._add(storage)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        made = Storage(storage.nbytes(), self._where())
        self._events.append(Event(made, True, made.made))

        def let_go(_: Any) -> None:
            last = self._by_key.pop(key, None)
            self._alive.pop(key, None)
            if last is not None and last.alive:
                last.alive, last.freed = False, self._where()
                self._events.append(Event(last, False, last.freed))

        self._by_key[key] = made
        self._alive[key] = weakref.ref(storage, let_go)

    def _see_resized(self, tensor: torch.Tensor, num_bytes: int) -> None:
        """Log that a storage was freed, or allocated again, while tensors refer to it."""
        before = self._by_key.get(tensor.untyped_storage()._cdata)
        if before is not None and before.alive:
            before.alive, before.freed = False, self._where()
            self._events.append(Event(before, False, before.freed))
        if num_bytes:
            self._add(tensor.untyped_storage())

    def storages(self) -> list[Storage[Label]]:
        """Return all storages that were allocated."""
        return [event.storage for event in list(self._events) if event.comes]

    def held(self) -> list[Storage[Label]]:
        """Return the storages that are alive now."""
        return [storage for storage in self.storages() if storage.alive]

    def held_bytes(self) -> int:
        """Return the bytes of the storages that are alive now."""
        return sum(storage.num_bytes for storage in self.held())

    def of(self, tensor: torch.Tensor) -> Storage[Label] | None:
        """Return the storage of a tensor; None if it was not allocated while the log was active."""
        return self._by_key.get(tensor.untyped_storage()._cdata)

    def peak(self, begin: int = 0) -> Peak:
        """Return the peak, not counting moments before event number `begin`."""
        events = list(self._events)
        most, at, held = -1, 0, 0
        for index, event in enumerate(events):
            held += event.storage.num_bytes if event.comes else -event.storage.num_bytes
            if index >= begin and held > most:
                most, at = held, index
        held_then: dict[Storage[Any], None] = {}
        for event in events[: at + 1]:
            if event.comes:
                held_then[event.storage] = None
            else:
                held_then.pop(event.storage)
        return Peak(max(most, 0), events[at].where if events else None, list(held_then))

    def events(self) -> list[Event]:
        """All that came and went so far, in order."""
        return list(self._events)

    @property
    def num_events(self) -> int:
        """Number of allocations and ends so far."""
        return len(self._events)
