"""Gradient sums of tied weights, which several stages hold."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.collectives.transport.announcements import announce_all_gather
from fused_megatron.observe.waits import COMMUNICATION, wait_for
from fused_megatron.pipeline.run.faults import lost_peers
from fused_megatron.sharding import parameter_record


class TiedWeight:
    """A tied weight on one rank.

    Args:
        parameters: this rank's parameters, by stage; a parameter of two stages counts once.
        group: exactly the ranks that hold the weight; None if only this rank does.
        ranks: the global ranks of the group.

    Communication: one all-gather of the gradient over these ranks. Every rank sums in rank order, and so gets the same
        bits (for two ranks the traffic of an all-reduce).
    """

    def __init__(
        self, parameters: Mapping[int, nn.Parameter], group: dist.ProcessGroup | None, ranks: Sequence[int] = ()
    ) -> None:
        self._parameters = list({id(parameter): parameter for _, parameter in sorted(parameters.items())}.values())
        self._group, self._ranks = group, ranks

    def reduce(self) -> None:
        """Sum the gradients over all stages, in place: summed_grad of the record, or grad if there is none."""
        gradients = [_gradient(parameter) for parameter in self._parameters]
        total = gradients[0]
        for gradient in gradients[1:]:
            total = total + gradient
        if self._group is not None:
            parts = [torch.empty_like(total) for _ in range(self._group.size())]
            with lost_peers():
                wait_for(COMMUNICATION, lambda: self._gather(parts, total))
            total = parts[0]
            for part in parts[1:]:
                total = total.add_(part)
        for gradient in gradients:
            if gradient is not total:
                gradient.copy_(total)

    def _gather(self, parts: list[torch.Tensor], total: torch.Tensor) -> None:
        assert self._group is not None
        announce_all_gather(total, self._ranks)
        self._group.allgather([parts], [total.contiguous()]).wait()

    def close(self) -> None:
        """Release the group."""
        self._group = None


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    summed = parameter_record(parameter).summed_grad
    if summed is not None:
        return summed
    if parameter.grad is None:  # no microbatch used the weight here; other stages have gradients
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
