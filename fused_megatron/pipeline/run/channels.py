"""Channels between the ranks of a pipeline: a process group for each pair of ranks and direction.

The first bytes of a pipeline go through another group, before its channels exist; see handshake.py.
"""

import os
import queue
import threading
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup

from fused_megatron.pipeline.schedule.routing import Channel


class Pending(Protocol):
    """A send or receive under way."""

    def is_completed(self) -> bool:
        """Whether the transfer is over and the tensor is free; raises the error of a transfer that failed."""

    def wait(self) -> None:
        """Wait until the transfer is over (on a GPU the stream waits, not the host); raises its error."""


class Transport(Protocol):
    """Network of an executor. Each (from, to, direction) is used in the order of the schedule.

    A transport with a method close() is closed with the executor: peers that wait for this rank must fail at once then.
    """

    def send(self, tensor: torch.Tensor, peer: int, direction: str, tag: int) -> Pending:
        """Start to send a contiguous tensor to a rank of the pipeline.

        direction: "forward" for activations, "backward" for gradients.
        """

    def receive(self, buffer: torch.Tensor, peer: int, direction: str, tag: int) -> Pending:
        """Start to receive into a tensor with the shape that the peer sends."""


class NCCLSettings(NamedTuple):
    """Options of ProcessGroupNCCL for a group of a pipeline.

    Attributes:
        is_high_priority_stream: whether kernels of the group start before kernels of the computation that wait.
        min_ctas, max_ctas: SMs that a kernel of the group takes; None: NCCL chooses.
    """

    is_high_priority_stream: bool
    min_ctas: int | None = None
    max_ctas: int | None = None


def nccl_settings(is_channel: bool) -> NCCLSettings:
    """Return the options of a channel between two ranks, or of a group that sums tied weights once a step.

    A receive is posted ahead of its message. Its kernel holds its SMs until the message comes, and no kernel of the
    computation runs on them: NCCL would take up to 32 of an H100's 132 for a pair of GPUs in a node. 2 to 4 are an
    estimate, not measured: one SM moves about 20 GB/s, and a message has the time of an action to arrive. At equal
    priority a message would start only when the products in the queue have ended.
    """
    return NCCLSettings(True, min_ctas=2, max_ctas=4) if is_channel else NCCLSettings(False)


def nccl_options(settings: NCCLSettings, timeout: timedelta) -> Any:
    """Return settings as ProcessGroupNCCL.Options, which only torch with CUDA has."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=settings.is_high_priority_stream)
    options._timeout = timeout
    for name in ("min_ctas", "max_ctas"):
        if getattr(settings, name) is not None:
            setattr(options.config, name, getattr(settings, name))
    return options


def make_group(
    store: dist.Store | None,
    name: str,
    rank: int,
    size: int,
    device: torch.device,
    timeout: timedelta,
    is_channel: bool = False,
) -> Any:
    """Make a process group that no registry knows, by a call that only its members make.

    Without a store there are no other ranks to meet, and the group is a fake one. is_channel: see nccl_settings.

    torch.distributed.new_group must be called by all ranks of the world, or else names the group after the number of
    groups that a rank has, which differs along a pipeline.
    """
    if store is None:
        return FakeProcessGroup._create_internal(rank, size)
    store = dist.PrefixStore(name, store)
    if device.type == "cuda":
        options = nccl_options(nccl_settings(is_channel), timeout)
        return dist.ProcessGroupNCCL(store, rank, size, options)
    return _connected_gloo(store, rank, size, timeout)


def _connected_gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """Make a gloo group whose ranks connect now, whatever TORCH_GLOO_LAZY_INIT says.

    Where ranks connect on demand, a posted receive waits until its sender connects, and a look for dead ranks waits for
    ranks that live.
    """
    gloo: Any = dist.ProcessGroupGloo  # its options are not in torch's stubs
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    devices = [gloo.create_device(interface=name, lazy_init=False) for name in names]
    options = gloo._Options()
    options._devices = devices or [gloo.create_default_device(lazy_init=False)]
    options._threads = 2 * len(options._devices)  # as torch does
    options._timeout = timeout
    return gloo(store, rank, size, options)


class Channels:
    """Transport over NCCL or gloo, with a process group for each (from, to, direction).

    Activations and gradients of two ranks never share a group, so that crossing sends cannot block each other, and a
    posted receive blocks no send. The constructor makes and uses all groups once, in the same order on all ranks.

    Args:
        keys: the channels of the whole pipeline, the same on all ranks.
        rank: this rank of the pipeline.
        store: store in which the ranks meet, with a prefix of this pipeline.
        device: device of the tensors.
        timeout: time-out of a wait.

    Communication: one message of one byte for each channel.
    """

    def __init__(
        self, keys: Iterable[Channel], rank: int, store: dist.Store, device: torch.device, timeout: timedelta
    ) -> None:
        self._rank = rank
        self._groups: dict[Channel, Any] = {}
        self._senders: dict[Channel, _Sender] = {}
        self._polls = device.type == "cuda"
        for key in sorted(set(keys), key=lambda key: (min(key[:2]), max(key[:2]), key)):
            source, target, direction = key
            if rank not in (source, target):
                continue
            name = f"{direction}/{source}-{target}"
            self._groups[key] = make_group(store, name, int(rank == target), 2, device, timeout, is_channel=True)
            byte = torch.zeros(1, dtype=torch.uint8, device=device)
            if rank == source:
                self.send(byte, target, direction, 0).wait()
            else:
                self.receive(byte, source, direction, 0).wait()

    def send(self, tensor: torch.Tensor, peer: int, direction: str, tag: int) -> Pending:
        """Start to send; see Transport."""
        key = Channel(self._rank, peer, direction)
        work = self._groups[key].send([tensor], 1, tag)
        if self._polls:
            return _Waited(work, tensor)
        if key not in self._senders:
            self._senders[key] = _Sender(f"sends {direction} to rank {peer}")
        return self._senders[key].watch(work, tensor)

    def receive(self, buffer: torch.Tensor, peer: int, direction: str, tag: int) -> Pending:
        """Start to receive; see Transport."""
        return _Waited(self._groups[Channel(peer, self._rank, direction)].recv([buffer], 0, tag), buffer)

    def close(self) -> None:
        """Cut all connections, after sends whose receiver has not asked for them yet."""
        for sender in self._senders.values():
            sender.close()
        if self._polls:
            for group in self._groups.values():
                group.abort()
        self._groups.clear()
        self._senders.clear()

    def __del__(self) -> None:
        for sender in self._senders.values():
            sender.close()


class _Waited:
    """A receive, or a send of NCCL, whose work knows when it is done."""

    def __init__(self, work: Any, tensor: torch.Tensor) -> None:
        self._work, self._tensor = work, tensor  # a reference to the tensor keeps its memory until the transfer is over

    def is_completed(self) -> bool:
        return self._work is None or self._work.is_completed()

    def wait(self) -> None:
        work, self._work = self._work, None
        try:
            if work is not None:
                work.wait()
        finally:
            del work  # otherwise the traceback of an error would keep the connection open


class _Sent:
    """A send that a thread waits for."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: Exception | None = None

    def is_completed(self) -> bool:
        if self.done.is_set() and self.error is not None:
            raise self.error
        return self.done.is_set()

    def wait(self) -> None:
        self.done.wait()
        self.is_completed()


class _Sender:
    """Thread that waits for the sends of one channel in order. gloo's work is completed only by a wait for it."""

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Any, torch.Tensor, _Sent] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(self._queue,), name=f"pipeline {name}", daemon=True).start()

    def watch(self, work: Any, tensor: torch.Tensor) -> _Sent:
        sent = _Sent()
        self._queue.put((work, tensor, sent))
        return sent

    def close(self) -> None:
        self._queue.put(None)

    @staticmethod
    def _run(waiting: "queue.SimpleQueue[tuple[Any, torch.Tensor, _Sent] | None]") -> None:
        while (item := waiting.get()) is not None:
            work, tensor, sent = item
            try:
                work.wait()
            except Exception as error:  # raised by is_completed() and wait() of the send
                sent.error = error
            # Free the memory before the send counts as done.
            del item, work, tensor
            sent.done.set()
