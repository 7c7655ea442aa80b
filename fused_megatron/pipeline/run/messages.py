"""Messages from stage to stage, tuples of tensors: receives are posted ahead, sends retired, shapes learnt once."""

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fused_megatron.checks import dtype_name
from fused_megatron.collectives.transport.announcements import announce_receive, announce_send
from fused_megatron.observe.waits import BUBBLE, wait_for
from fused_megatron.pipeline.run.channels import Pending, Transport
from fused_megatron.pipeline.run.faults import lost_peers
from fused_megatron.pipeline.schedule.action import SENDS, Action, Kind, Schedule
from fused_megatron.pipeline.schedule.routing import Channel, channel_of, peer


class TensorSpec(NamedTuple):
    """What a receiver must know of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """The spec of a tensor."""
    return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
HEADER_NUMBERS = 128
"""Length of a header."""
_TENSORS_PER_MESSAGE = 32  # tags of one message: those of its tensors, and two more
_FLAGS, _HEADER = 30, 31


class _Arrival:
    """A receive: not yet posted, or with its buffers."""

    def __init__(self, action: Action, channel: Channel, key: tuple[int, int]) -> None:
        self.action = action
        self.channel = channel
        self.key = key
        self.header: tuple[Pending, torch.Tensor] | None = None
        self.flags: torch.Tensor | None = None
        self.tensors: list[torch.Tensor] | None = None
        self.pending: list[Pending] = []


class Messages:
    """The messages of one rank.

    What a stage sends depends only on the shapes of its input, so a microbatch carries a number for the shapes that
    it entered the pipeline with (`shape_ids`, step_table.py). When a stage sees a new number it sends a header of 1 KiB
    ahead of its tensors; both sides keep it, and all later receives can be posted before they are needed. Gradients
    have the shapes of what was sent.

    A tensor that the next stage does not use has no gradient: None, as in one process, so that what only it comes from
    has none either. The first gradients of new shapes say ahead whether there are all of them. If not, these and later
    ones come with a flag for each. If so, one that is missing later is sent as zeros, since nobody expects a flag.

    Args:
        schedule: lowered.
        transport: the network; None for one rank, which sends nothing.
        device: of what is received.
        ranks: the global rank of each rank of the pipeline, for those who watch; None: the same numbers.
    """

    def __init__(
        self,
        schedule: Schedule,
        transport: Transport | None,
        device: torch.device,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self._schedule = schedule
        self._ranks = range(schedule.num_ranks) if ranks is None else ranks
        self._transport = transport
        self._device = device
        self._specs: dict[tuple[int, int], tuple[TensorSpec, ...]] = {}
        # By the key of the tensors that they are gradients of: whether flags come with them.
        self._flagged: dict[tuple[int, int], bool] = {}
        self._leaving: list[tuple[Pending, int]] = []
        self._arriving: dict[Action, _Arrival] = {}  # in the order in which they were announced

    def send(self, action: Action, tensors: Sequence[torch.Tensor | None], shape_id: int) -> None:
        """Begin to send; the tensors are held until they are through, and must not change until then.

        Args:
            tensors: activations, or gradients, of which some may be None.

        Raises:
            ValueError: other shapes than for the same input before, which the receiver could not know.
        """
        given = [tensor for tensor in tensors if tensor is not None]
        if action.kind == Kind.SEND_F:
            self._announce(action, tuple(spec_of(tensor) for tensor in given), shape_id)
        else:
            given = self._complete(action, tensors, (action.stage - 1, shape_id))
        for index, tensor in enumerate(given):
            self._send(action, tensor.detach(), index)

    def _complete(
        self, action: Action, gradients: Sequence[torch.Tensor | None], key: tuple[int, int]
    ) -> list[torch.Tensor]:
        """Gradients with zeros where there are none; says so ahead, once, and in flags."""
        missing = [gradient is None for gradient in gradients]
        if gradients and key not in self._flagged:
            self._flagged[key] = any(missing)
            self._send(action, torch.tensor([int(any(missing))], device=self._device), _HEADER)
        if self._flagged.get(key):
            self._send(action, torch.tensor(missing, dtype=torch.uint8, device=self._device), _FLAGS)
        specs = [spec for spec in self._specs[key] if spec.requires_grad]
        return [
            torch.zeros(spec.shape, dtype=spec.dtype, device=self._device) if gradient is None else gradient
            for gradient, spec in zip(gradients, specs, strict=True)
        ]

    def _announce(self, action: Action, specs: tuple[TensorSpec, ...], shape_id: int) -> None:
        known = self._specs.setdefault((action.stage, shape_id), specs)
        if known != specs:
            raise ValueError(
                f"stage {action.stage} returned {_shown(specs)} for microbatch {action.microbatch}, and "
                f"{_shown(known)} for an input of the same shapes before: what a stage returns must follow from "
                "shapes, dtypes and plain values of the inputs and stage_kwargs (pass the rest in stage_kwargs)"
            )
        if known is specs:
            header = torch.tensor(encode_header(specs), device=self._device)
            self._send(action, header, _HEADER)

    def _send(self, action: Action, tensor: torch.Tensor, index: int) -> None:
        if tensor.numel():
            assert self._transport is not None
            source, target, direction = channel_of(self._schedule, action)
            announce_send(tensor, self._ranks[source], self._ranks[target])
            with lost_peers(target):
                pending = self._transport.send(tensor.contiguous(), target, direction, self._tag(action, index))
            self._leaving.append((pending, target))

    def _tag(self, action: Action, index: int) -> int:
        sender = action if action.kind in SENDS else peer(action)
        number = sender.microbatch * self._schedule.num_stages + sender.stage
        return (number * _TENSORS_PER_MESSAGE + index) % 2**31

    def post(self, action: Action, shape_id: int) -> None:
        """Announce a receive: its buffers are allocated and handed over now, or when their shapes are known."""
        channel = channel_of(self._schedule, action)
        # Gradients have the shapes of what this stage sent; activations of what the one before it sends.
        key = (action.stage - 1 if action.kind == Kind.RECV_F else action.stage, shape_id)
        self._arriving[action] = _Arrival(action, channel, key)
        self._advance(channel)

    def take(self, action: Action) -> list[torch.Tensor] | list[torch.Tensor | None]:
        """What was received; waits for it. Activations that need a gradient say so; of gradients some may be None."""
        arrival = self._arriving[action]
        if arrival.tensors is None:
            self._advance(arrival.channel, wanted=arrival)
        assert arrival.tensors is not None, f"{action} is scheduled before the message that determines its shape"
        del self._arriving[action]
        for pending in arrival.pending:
            self._await(pending, arrival.channel.source)
        if arrival.flags is None:
            return arrival.tensors
        missing = arrival.flags.tolist()
        return [None if absent else tensor for absent, tensor in zip(missing, arrival.tensors, strict=True)]

    def _advance(self, channel: Channel, wanted: _Arrival | None = None) -> None:
        """Post what can be, in the order of the channel; up to the wanted one wait for the headers."""
        for arrival in [each for each in self._arriving.values() if each.channel == channel and each.tensors is None]:
            forward = arrival.action.kind == Kind.RECV_F
            if not forward and arrival.key not in self._specs:
                return  # this stage has yet to send, and learns the shape by that
            if self._needs_header(arrival, forward):
                if arrival.header is None:
                    numbers = HEADER_NUMBERS if forward else 1
                    buffer = torch.empty(numbers, dtype=torch.int64, device=self._device)
                    arrival.header = (self._receive(arrival, buffer, _HEADER), buffer)
                if wanted is None:
                    return
                self._await(arrival.header[0], channel.source)
                found = arrival.header[1].tolist()
                if forward:
                    self._specs[arrival.key] = _decode(found)
                else:
                    self._flagged[arrival.key] = bool(found[0])
            self._post(arrival, self._specs[arrival.key])
            if arrival is wanted:
                wanted = None

    def _needs_header(self, arrival: _Arrival, forward: bool) -> bool:
        if forward:
            return arrival.key not in self._specs
        return arrival.key not in self._flagged and any(spec.requires_grad for spec in self._specs[arrival.key])

    def _post(self, arrival: _Arrival, specs: tuple[TensorSpec, ...]) -> None:
        forward = arrival.action.kind == Kind.RECV_F
        if not forward and self._flagged.get(arrival.key):
            arrival.flags = torch.empty(
                sum(spec.requires_grad for spec in specs), dtype=torch.uint8, device=self._device
            )
            arrival.pending.append(self._receive(arrival, arrival.flags, _FLAGS))
        arrival.tensors = []
        # Of a backward message the indices are those of the gradients, as its sender counts them.
        for spec in specs if forward else [spec for spec in specs if spec.requires_grad]:
            buffer = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
            if buffer.numel():
                arrival.pending.append(self._receive(arrival, buffer, len(arrival.tensors)))
            arrival.tensors.append(buffer.requires_grad_(spec.requires_grad and forward))

    def _receive(self, arrival: _Arrival, buffer: torch.Tensor, index: int) -> Pending:
        assert self._transport is not None
        source, target, direction = arrival.channel
        announce_receive(buffer, self._ranks[source], self._ranks[target])
        with lost_peers(source):
            return self._transport.receive(buffer, source, direction, self._tag(arrival.action, index))

    def retire(self) -> None:
        """Let go of what is through."""
        self._leaving = [each for each in self._leaving if not self._wait(each[0].is_completed, each[1])]

    def finish(self) -> None:
        """Wait until all is through."""
        while self._leaving:
            pending, target = self._leaving.pop(0)
            self._wait(pending.wait, target)
        assert not self._arriving, "every receive has its use"

    def clear(self) -> None:
        """Forget all messages, after a fault."""
        self._leaving.clear()
        self._arriving.clear()

    def _await(self, pending: Pending, rank: int) -> None:
        """Until a message of another stage is there."""
        self._wait(lambda: wait_for(BUBBLE, pending.wait), rank)

    @staticmethod
    def _wait(wait: Callable[[], bool | None], rank: int) -> bool | None:
        with lost_peers(rank):
            return wait()


def _shown(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{dtype_name(spec.dtype)}{list(spec.shape)}" for spec in specs) or "nothing"


def encode_header(specs: Sequence[TensorSpec]) -> list[int]:
    """The int64 numbers that say ahead of a message which tensors it has.

    Raises:
        TypeError: a dtype that cannot be sent.
        ValueError: more tensors than a header has room for.
    """
    numbers = [len(specs)]
    for spec in specs:
        if spec.dtype not in _DTYPES:
            raise TypeError(f"a stage returned a tensor of dtype {spec.dtype}, which cannot be sent (cast it)")
        numbers += [_DTYPES.index(spec.dtype), int(spec.requires_grad), len(spec.shape), *spec.shape]
    if len(specs) > _FLAGS or len(numbers) > HEADER_NUMBERS - 1:
        raise ValueError(f"a stage returned {len(specs)} tensors, more than fit a header (join some of them)")
    numbers += [0] * (HEADER_NUMBERS - 1 - len(numbers))
    return [*numbers, _checksum(numbers)]


def _decode(numbers: list[int]) -> tuple[TensorSpec, ...]:
    assert numbers[-1] == _checksum(numbers[:-1]), "a header was expected"
    specs, rest = [], numbers[1:]
    for _ in range(numbers[0]):
        dtype, requires_grad, dims = rest[:3]
        specs.append(TensorSpec(tuple(rest[3 : 3 + dims]), _DTYPES[dtype], bool(requires_grad)))
        rest = rest[3 + dims :]
    return tuple(specs)


def _checksum(numbers: Sequence[int]) -> int:
    return zlib.crc32(repr(list(numbers)).encode())
