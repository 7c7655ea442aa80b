"""Pipeline transport over gloo with the strictest rules of NCCL: a program that runs on it cannot hang on NCCL.

gloo is more tolerant than NCCL: it matches messages by tag in any order, and any number of messages can be in flight.
Here a channel is a queue. Both sides start one message at a time, in the order of their calls, and nothing is buffered:
a send reads its tensor and ends only when the peer has reached the matching receive; later messages have not started
before that. Tags have no effect. A program that would hang raises an error within seconds.
"""

import math
import threading
from collections import deque
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from fused_megatron.checks import check, check_one_of
from fused_megatron.pipeline.schedule.routing import DIRECTIONS

# Different from the tags of other users of the group.
_FIRST_TAG = 1 << 20
_READY, _HEADER, _DATA = range(3)
_WAIT_S = 0.1


class StrictChannelError(RuntimeError):
    """An error for which NCCL would hang or deliver another message's data."""


@dataclass(eq=False)
class Message:
    """One send or receive in flight; the transport returns it to the caller.

    Attributes:
        description: names the message in errors.
        tensor: kept alive until the message is complete.
    """

    description: str
    tensor: torch.Tensor
    is_send: bool
    tag: int
    timeout_s: float
    queue: "deque[Message | None]"
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def is_completed(self) -> bool:
        """Return whether the message is complete.

        Raises:
            StrictChannelError: the message failed.
        """
        if self.error is not None:
            raise StrictChannelError(f"{self.description}: {self.error}") from self.error
        return self.done.is_set()

    def wait(self) -> None:
        """Wait until the message is complete.

        Raises:
            StrictChannelError: the wait took too long, or the two sides have different sizes.
        """
        # In short waits: if the whole process is stopped for some time, only one short wait is lost.
        if not any(self.done.wait(_WAIT_S) for _ in range(math.ceil(self.timeout_s / _WAIT_S))):
            others = [message.description for message in list(self.queue) if message not in (self, None)]
            raise StrictChannelError(
                f"deadlock: {self.description} has not happened in {self.timeout_s:g} s; "
                f"queued on its channel: {', '.join(others) or 'nothing else'}"
            )
        self.is_completed()


class StrictChannels:
    """A transport for `fused_megatron.pipeline.run.executor.PipelineExecutor`.

    Args:
        pp_group: the ranks of the pipeline; CPU tensors over gloo.
        timeout_s: duration of a wait after which it counts as a deadlock.
        both_ways: True: one channel per pair of ranks and direction, like a NCCL communicator of the pair. False: one
            channel for each sender.

    Attributes:
        crossed: (peer, tag sent, tag expected) of every message that this rank received instead of another.

    Communication:
        32 bytes per message in addition to its own bytes.
    """

    def __init__(self, pp_group: dist.ProcessGroup, *, timeout_s: float = 10.0, both_ways: bool = False) -> None:
        self.group = pp_group
        self.rank = dist.get_rank(pp_group)
        self.timeout_s = timeout_s
        self.both_ways = both_ways
        self.crossed: list[tuple[int, int, int]] = []
        self._channels: dict[tuple[int, int, str], _Channel] = {}

    def send(self, tensor: torch.Tensor, peer: int, direction: str, tag: int) -> Message:
        """Queue a tensor for a peer; it must not change until the message is complete.

        Args:
            tensor: any dtype, contiguous, as NCCL requires.
            peer: rank in pp_group.
            direction: "forward" or "backward".
            tag: only for `crossed`.
        """
        return self._queue(tensor, peer, direction, tag, is_send=True)

    def receive(self, buffer: torch.Tensor, peer: int, direction: str, tag: int) -> Message:
        """Queue a buffer for the peer's next message in this direction; arguments as in `send`."""
        return self._queue(buffer, peer, direction, tag, is_send=False)

    def close(self) -> None:
        """End the channels' threads after their queued messages; the next send or receive starts new threads."""
        for channel in self._channels.values():
            channel.put(None)
        self._channels.clear()

    def _queue(self, tensor: torch.Tensor, peer: int, direction: str, tag: int, *, is_send: bool) -> Message:
        check_one_of("direction", direction, DIRECTIONS)
        size = dist.get_world_size(self.group)
        check(peer != self.rank and 0 <= peer < size, f"peer={peer} must be another rank of pp_group, 0 to {size - 1}")
        check(tensor.is_contiguous(), f"tensor of strides {tensor.stride()} must be contiguous (call contiguous())")
        pair = (self.rank, peer) if is_send else (peer, self.rank)
        key = (min(pair), max(pair), direction) if self.both_ways else (*pair, direction)
        if key not in self._channels:
            self._channels[key] = _Channel(self, peer, _FIRST_TAG + 3 * DIRECTIONS.index(direction))
        channel = self._channels[key]
        description = (
            f"rank {self.rank}: {'send to' if is_send else 'receive from'} rank {peer} {direction} (tag {tag})"
        )
        message = Message(description, tensor.detach(), is_send, tag, self.timeout_s, channel.queue)
        channel.put(message)
        return message


class _Channel:
    """A queue and a thread that processes it, so that a message can complete while its rank computes."""

    def __init__(self, transport: StrictChannels, peer: int, first_tag: int) -> None:
        self.transport = transport
        self.peer = peer
        self.first_tag = first_tag
        self.queue: deque[Message | None] = deque()
        self._filled = threading.Semaphore(0)
        self._error: BaseException | None = None
        threading.Thread(target=self._work, daemon=True, name=f"channel with rank {peer}").start()

    def put(self, message: Message | None) -> None:
        self.queue.append(message)
        self._filled.release()

    def _work(self) -> None:
        while True:
            self._filled.acquire()
            message = self.queue[0]
            if message is None:
                return
            try:
                if self._error is not None:  # after a failure every message fails, as in an aborted communicator
                    raise self._error
                self._send(message) if message.is_send else self._receive(message)
            except BaseException as error:
                message.error = self._error = error
            self.queue.popleft()
            message.done.set()

    def _send(self, message: Message) -> None:
        num_bytes = message.tensor.numel() * message.tensor.element_size()
        (wanted,) = self._get(torch.empty(1, dtype=torch.int64), _READY).tolist()
        self._put(torch.tensor([num_bytes, message.tag]), _HEADER)
        _check_sizes(num_bytes, wanted)
        if num_bytes:
            self._put(_as_bytes(message.tensor), _DATA)

    def _receive(self, message: Message) -> None:
        wanted = message.tensor.numel() * message.tensor.element_size()
        self._put(torch.tensor([wanted]), _READY)
        num_bytes, tag = self._get(torch.empty(2, dtype=torch.int64), _HEADER).tolist()
        _check_sizes(num_bytes, wanted)
        if tag != message.tag:
            self.transport.crossed.append((self.peer, tag, message.tag))
        if num_bytes:
            self._get(_as_bytes(message.tensor), _DATA)

    def _put(self, tensor: torch.Tensor, part: int) -> None:
        self.transport.group.send([tensor], self.peer, self.first_tag + part).wait()

    def _get(self, tensor: torch.Tensor, part: int) -> torch.Tensor:
        self.transport.group.recv([tensor], self.peer, self.first_tag + part).wait()
        return tensor


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _check_sizes(num_bytes: int, wanted: int) -> None:
    if num_bytes != wanted:
        raise StrictChannelError(f"{num_bytes} bytes were sent where {wanted} are received")
