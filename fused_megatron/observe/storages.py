"""Storages that ops make: how many bytes each has, where it is made and where it is let go."""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.utils._pytree import tree_leaves

Label = TypeVar("Label", bound=Hashable)


class Storage(Generic[Label]):
    """A storage that was made while somebody looked.

    Attributes:
        num_bytes: of it.
        made: where its op ran.
        freed: where the last tensor of it went; None while there is one.
    """

    __slots__ = ("alive", "freed", "made", "num_bytes")

    def __init__(self, num_bytes: int, made: Label) -> None:
        self.num_bytes, self.made = num_bytes, made
        self.alive = True
        self.freed: Label | None = None


class Event(NamedTuple):
    """A storage that comes, or goes, and where that was."""

    storage: Storage[Any]
    comes: bool
    where: Any


class Peak(NamedTuple):
    """The most bytes that were held at once.

    Attributes:
        num_bytes: of all storages then.
        where: the label of the moment.
        storages: those that were held.
    """

    num_bytes: int
    where: Any
    storages: list[Storage[Any]]


class StorageLog(Generic[Label]):
    """Every storage that comes out of an op, once, however many tensors and views share it.

    For a TorchDispatchMode, which hands each op to see(). Works on real tensors and on those of a FakeTensorMode. What
    a kernel takes and gives back inside is not seen, nor is memory that no op made.

    Args:
        where: the label of this moment, for what is made or let go now.
    """

    def __init__(self, where: Callable[[], Label]) -> None:
        self._where = where
        # A list, since other threads let storages go, too: a transport's, when a message is through.
        self._events: list[Event] = []
        # By the address of torch's storage, which has a Python object as long as it lives.
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._by_key: dict[int, Storage[Label]] = {}

    def see(self, func: Any, inputs: Any, result: Any) -> None:
        """An op that has run."""
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
        # A view of, or a result written to, what no op made; but torch.tensor(..) lifts what it has just made.
        if func is not torch.ops.aten.lift_fresh.default and any(
            isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata == key for leaf in tree_leaves(inputs)
        ):
            return
        made = Storage(storage.nbytes(), self._where())
        self._events.append(Event(made, True, made.made))

        def let_go(_: Any) -> None:
            self._alive.pop(key, None)
            self._by_key.pop(key, None)
            made.alive, made.freed = False, self._where()
            self._events.append(Event(made, False, made.freed))

        self._by_key[key] = made
        self._alive[key] = weakref.ref(storage, let_go)

    def storages(self) -> list[Storage[Label]]:
        """All that were made."""
        return [event.storage for event in list(self._events) if event.comes]

    def held(self) -> list[Storage[Label]]:
        """Those that are there now."""
        return [storage for storage in self.storages() if storage.alive]

    def held_bytes(self) -> int:
        """Of those that are there now."""
        return sum(storage.num_bytes for storage in self.held())

    def of(self, tensor: torch.Tensor) -> Storage[Label] | None:
        """The storage of a tensor; None for one that no op made while somebody looked."""
        return self._by_key.get(tensor.untyped_storage()._cdata)

    def peak(self, begin: int = 0) -> Peak:
        """The most that was held at once, after so many events."""
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
        """Of all that came and went so far."""
        return len(self._events)
