"""Sums of a training step over all ranks: on the device, where they decide the update, and read by the host."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fused_megatron.assembly.assemble import Assembly
from fused_megatron.collectives import Group
from fused_megatron.collectives.together import sum_over_ranks_
from fused_megatron.sharding.gradient_norm import clip_coefficient_on_device


@dataclass(frozen=True)
class StepSums:
    """Sums of a step over all ranks, in host memory.

    Attributes:
        loss: mean over the targets of the global batch, with auxiliary losses.
        gradient_norm: of the whole model, before clipping.
        finite: True if the loss and the gradient norm are finite on every rank.
        flags: the ranks' flags, summed over the ranks.
        expert_loads: loads of the experts, summed over the ranks, as ExpertLoads.of_rank.
    """

    loss: float
    gradient_norm: float
    finite: bool
    flags: list[float]
    expert_loads: torch.Tensor


class DeviceSums:
    """The same sums on the device, without a wait of the host; read() waits for them.

    All ranks get the same numbers, and so agree on every decision: a NaN of one rank is in the sums.

    Args:
        message: [2 + flags + numbers of the experts' loads] float64: loss, gradient norm, flags, loads.
        num_flags: number of flags.
        num_refusing: number of the first flags that keep the weights as they are.
        expert_loads: the loads, a view of the message.

    Attributes:
        refused: whether the weights must stay as they are, a 0-dim bool tensor: the loss or the norm is not finite, or
            a rank has set one of the first num_refusing flags.
    """

    def __init__(self, message: torch.Tensor, num_flags: int, num_refusing: int, expert_loads: torch.Tensor) -> None:
        self._message, self._num_flags = message, num_flags
        self.expert_loads = expert_loads
        not_finite = message[:2].isfinite().all().logical_not_()
        self.refused = not_finite.logical_or_(message[2 : 2 + num_refusing].any())
        # Into pinned memory, so that the copy waits for the device and the host does not.
        self._host = message.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if message.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(message.device))

    def gradient_scale(self, clip_norm: float) -> torch.Tensor:
        """Return the factor that clips the gradients, a 0-dim float32 tensor."""
        return clip_coefficient_on_device(self._message[1], clip_norm)

    def read(self) -> StepSums:
        """Return the sums as numbers of the host, which waits for the device once."""
        if self._copied is not None:
            self._copied.synchronize()
        first_load = 2 + self._num_flags
        loss, norm, *flags = self._host[:first_load].tolist()
        finite = math.isfinite(norm) and math.isfinite(loss)
        return StepSums(loss, norm, finite, flags, self._host[first_load:].view_as(self.expert_loads))


def start_sums(
    assembly: Assembly, loss_sum: torch.Tensor, flags: Sequence[float], num_refusing: int, group: Group
) -> DeviceSums:
    """Sum the loss, the squares of the gradients, the flags and the experts' loads over all ranks.

    Args:
        assembly: of this rank, after accumulate_batch.
        loss_sum: result of accumulate_batch.
        flags: numbers of this rank, equally many on every rank.
        num_refusing: number of the first flags that keep the weights as they are.
        group: all ranks of the run.

    Communication: one all-reduce of 8 bytes a number.
    """
    # They all hold the loss of their samples and positions.
    layer_ranks = assembly.mesh.tp_size * assembly.mesh.pp_size
    squares = assembly.share_of_squares()
    # Filled on the device: a copy of a list would make the host wait for it.
    numbers = [squares.new_full((), flag) for flag in flags]
    numbers = [(loss_sum / layer_ranks).reshape(()), squares, *numbers]
    loads = assembly.expert_loads.of_rank(squares.device)
    message = torch.cat([torch.stack(numbers), loads.flatten()])
    sum_over_ranks_(message, group)
    # In float32, so that the order of the sums, which follows the layout, does not reach the weights by clipping.
    message[1] = message[1].sqrt().float()
    return DeviceSums(message, len(flags), num_refusing, message[len(numbers) :].view_as(loads))


def sum_over_ranks(assembly: Assembly, loss_sum: torch.Tensor, flags: Sequence[float], group: Group) -> StepSums:
    """Return start_sums() as numbers of the host, which waits for the device once."""
    return start_sums(assembly, loss_sum, flags, 0, group).read()
