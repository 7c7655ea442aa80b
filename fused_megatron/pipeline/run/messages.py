"""Messages between stages: tuples of tensors, with receives posted ahead and shapes exchanged once."""

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fused_megatron.checks import dtype_name
from fused_megatron.collectives.transport.announcements import announce_receive, announce_send
from fused_megatron.observe.waits import BUBBLE, wait_for
from fused_megatron.pipeline.run.channels import Pending, Transport
from fused_megatron.pipeline.run.faults import lost_peers
from fused_megatron.pipeline.run.message_parts import MessageParts
from fused_megatron.pipeline.schedule.action import SENDS, Action, Kind, Schedule
from fused_megatron.pipeline.schedule.routing import Channel, channel_of, peer


class TensorSpec(NamedTuple):
    """Facts about a tensor that its receiver needs."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Return the spec of a tensor."""
    return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
HEADER_NUMBERS = 128
"""Length of a header."""
_TENSORS_PER_MESSAGE = 32  # tags of one message: one for each tensor, and two more
_FLAGS, _HEADER = 30, 31


class _Receive:
    """A receive that is announced; with its buffers, once it is posted."""

    def __init__(self, action: Action, channel: Channel, key: tuple[int, int]) -> None:
        self.action = action
        self.channel = channel
        self.key = key
        self.header: tuple[Pending, torch.Tensor] | None = None
        self.flags: torch.Tensor | None = None
        self.buffers: list[tuple[torch.Tensor, TensorSpec]] | None = None  # parts of the tensors
        self.pending: list[Pending] = []


class Messages:
    """Messages of one rank to and from other ranks.

    The shapes of a stage's output depend only on the shapes of its input. So each microbatch has a number for the
    shapes with which it entered the pipeline (`shape_ids`, step_table.py). For a new number a stage sends a header of
    1 KiB ahead of its tensors. Both sides keep the header, so that all later receives can be posted before their use.
    Gradients have the shapes of the activations.

    If the next stage does not use a tensor, its gradient is None, as in one process, so that tensors before it get no
    gradient either. The first gradients of new shapes are preceded by a note on whether all of them exist. If not,
    these and all later ones are sent with a flag for each gradient. If so, a gradient that is missing later is sent as
    zeros, since the receiver expects no flags.

    Args:
        schedule: the lowered schedule.
        transport: the network; None for one rank, which sends nothing.
        device: device of the received tensors.
        parts: division of the tensors over ranks that hold the same ones; None: this rank sends whole tensors. Headers
            and flags are whole.
        ranks: the global rank of each rank of the pipeline, for tools that watch messages; None: the same numbers.
    """

    def __init__(
        self,
        schedule: Schedule,
        transport: Transport | None,
        device: torch.device,
        parts: MessageParts | None = None,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self._schedule = schedule
        self._parts = MessageParts(None) if parts is None else parts
        self._ranks = range(schedule.num_ranks) if ranks is None else ranks
        self._transport = transport
        self._device = device
        self._specs: dict[tuple[int, int], tuple[TensorSpec, ...]] = {}
        # Whether gradients are sent with flags, by the key of the activations.
        self._flagged: dict[tuple[int, int], bool] = {}
        self._sends: list[tuple[Pending, int]] = []
        self._receives: dict[Action, _Receive] = {}  # in the order in which they were announced

    def send(self, action: Action, tensors: Sequence[torch.Tensor | None], shape_id: int) -> None:
        """Start to send tensors, which are kept, and must not change, until they are sent.

        Args:
            action: a SEND_F or SEND_B.
            tensors: activations, or gradients, which may be None.
            shape_id: number for the shapes of the microbatch.

        Raises:
            ValueError: the shapes differ from earlier ones of the same shape_id, so that the receiver would be wrong.
        """
        present = [tensor for tensor in tensors if tensor is not None]
        if action.kind == Kind.SEND_F:
            self._record_specs(action, tuple(spec_of(tensor) for tensor in present), shape_id)
        else:
            present = self._complete(action, tensors, (action.stage - 1, shape_id))
        for index, tensor in enumerate(present):
            self._send(action, self._parts.of(tensor.detach().contiguous()), index)

    def _complete(
        self, action: Action, gradients: Sequence[torch.Tensor | None], key: tuple[int, int]
    ) -> list[torch.Tensor]:
        """Return gradients with zeros in place of None; before that, send the note and the flags on None if needed."""
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

    def _record_specs(self, action: Action, specs: tuple[TensorSpec, ...], shape_id: int) -> None:
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
                pending = self._transport.send(tensor, target, direction, self._tag(action, index))
            self._sends.append((pending, target))

    def _tag(self, action: Action, index: int) -> int:
        sender = action if action.kind in SENDS else peer(action)
        number = sender.microbatch * self._schedule.num_stages + sender.stage
        return (number * _TENSORS_PER_MESSAGE + index) % 2**31

    def post(self, action: Action, shape_id: int) -> None:
        """Announce a receive. Its buffers are allocated and posted now, or as soon as their shapes are known."""
        channel = channel_of(self._schedule, action)
        # Gradients have the shapes that this stage sent; activations have the shapes that the stage before it sends.
        key = (action.stage - 1 if action.kind == Kind.RECV_F else action.stage, shape_id)
        self._receives[action] = _Receive(action, channel, key)
        self._advance(channel)

    def take(self, action: Action) -> list[torch.Tensor] | list[torch.Tensor | None]:
        """Wait for a message, and return its tensors. Activations have requires_grad set; gradients may be None.

        Ranks that share the tensors gather their parts, so they all take their messages in the same order.
        """
        receive = self._receives[action]
        if receive.buffers is None:
            self._advance(receive.channel, wanted=receive)
        assert receive.buffers is not None, f"{action} is scheduled before the message that determines its shape"
        del self._receives[action]
        for pending in receive.pending:
            self._wait_for_message(pending, receive.channel.source)
        forward, buffers, tensors = action.kind == Kind.RECV_F, receive.buffers, []
        while buffers:  # a part is freed before the next tensor comes
            buffer, spec = buffers.pop(0)
            tensors.append(self._parts.gather(buffer, spec.shape).requires_grad_(spec.requires_grad and forward))
            del buffer
        if receive.flags is None:
            return tensors
        missing = receive.flags.tolist()
        return [None if absent else tensor for absent, tensor in zip(missing, tensors, strict=True)]

    def _advance(self, channel: Channel, wanted: _Receive | None = None) -> None:
        """Post all receives whose shapes are known, in the order of the channel; wait for headers up to `wanted`."""
        for receive in [each for each in self._receives.values() if each.channel == channel and each.buffers is None]:
            forward = receive.action.kind == Kind.RECV_F
            if not forward and receive.key not in self._specs:
                return  # this stage has not sent the activations yet, and so does not know their shapes
            if self._needs_header(receive, forward):
                if receive.header is None:
                    numbers = HEADER_NUMBERS if forward else 1
                    buffer = torch.empty(numbers, dtype=torch.int64, device=self._device)
                    receive.header = (self._receive(receive, buffer, _HEADER), buffer)
                if wanted is None:
                    return
                self._wait_for_message(receive.header[0], channel.source)
                found = receive.header[1].tolist()
                if forward:
                    self._specs[receive.key] = _decode(found)
                else:
                    self._flagged[receive.key] = bool(found[0])
            self._post(receive, self._specs[receive.key])
            if receive is wanted:
                wanted = None

    def _needs_header(self, receive: _Receive, forward: bool) -> bool:
        if forward:
            return receive.key not in self._specs
        return receive.key not in self._flagged and any(spec.requires_grad for spec in self._specs[receive.key])

    def _post(self, receive: _Receive, specs: tuple[TensorSpec, ...]) -> None:
        forward = receive.action.kind == Kind.RECV_F
        if not forward and self._flagged.get(receive.key):
            receive.flags = torch.empty(
                sum(spec.requires_grad for spec in specs), dtype=torch.uint8, device=self._device
            )
            receive.pending.append(self._receive(receive, receive.flags, _FLAGS))
        receive.buffers = []
        # In a backward message the sender numbers the gradients only, without tensors that need none.
        for spec in specs if forward else [spec for spec in specs if spec.requires_grad]:
            buffer = self._parts.new_buffer(spec.shape, spec.dtype, self._device)
            filled = self._parts.filled(buffer, spec.shape)
            if filled.numel():
                receive.pending.append(self._receive(receive, filled, len(receive.buffers)))
            receive.buffers.append((buffer, spec))

    def _receive(self, receive: _Receive, buffer: torch.Tensor, index: int) -> Pending:
        assert self._transport is not None
        source, target, direction = receive.channel
        announce_receive(buffer, self._ranks[source], self._ranks[target])
        with lost_peers(source):
            return self._transport.receive(buffer, source, direction, self._tag(receive.action, index))

    def retire(self) -> None:
        """Free the tensors of sends that are done."""
        self._sends = [each for each in self._sends if not self._wait(each[0].is_completed, each[1])]

    def finish(self) -> None:
        """Wait until all sends are done."""
        while self._sends:
            pending, target = self._sends.pop(0)
            self._wait(pending.wait, target)
        assert not self._receives, "every receive has its use"

    def clear(self) -> None:
        """Forget all messages, after a fault."""
        self._sends.clear()
        self._receives.clear()

    def _wait_for_message(self, pending: Pending, rank: int) -> None:
        """Wait until a message of another stage is there."""
        self._wait(lambda: wait_for(BUBBLE, pending.wait), rank)

    @staticmethod
    def _wait(wait: Callable[[], bool | None], rank: int) -> bool | None:
        with lost_peers(rank):
            return wait()


def _shown(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{dtype_name(spec.dtype)}{list(spec.shape)}" for spec in specs) or "nothing"


def encode_header(specs: Sequence[TensorSpec]) -> list[int]:
    """Encode the specs of a message's tensors as the HEADER_NUMBERS int64 numbers of its header.

    Raises:
        TypeError: a dtype cannot be sent.
        ValueError: the tensors do not fit in a header.
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
