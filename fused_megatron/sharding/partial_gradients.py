"""Parameters that several ranks hold, and that each of them uses with its own tokens or heads."""

import torch

from fused_megatron.collectives import Group, group_size, identity_all_reduce_together
from fused_megatron.sharding.parameter_record import parameter_record


def used_by_parts(parameters: tuple[torch.Tensor, ...], group: Group) -> tuple[torch.Tensor, ...]:
    """Return parameters for a use in which each rank computes its own part: its own tokens, or its own heads.

    The gradient of such a use is partial: its sum over the ranks is the gradient. As a rule backward sums it at once,
    so that the gradient is complete when backward() returns. If all the parameters have `sum_later` in their records
    (GradientBuckets set it), the sum is left to the buckets, which sum the gradients of all such parameters together,
    once in a step. torch.autograd.grad then returns this rank's part.

    Args:
        parameters: [..] float, the same on every rank. All other uses of them must be by parts of the same group, too.
        group: the ranks; None for this rank only.

    Returns:
        The parameters, or views of them.

    Communication: none forward; backward one all-reduce of 4 bytes an element, or none if the sum is left to the
        buckets.
    """
    if group_size(group) == 1:
        return parameters
    return parameters if _are_summed_later(parameters, group) else identity_all_reduce_together(parameters, group)


@torch._disable_dynamo  # the graph is cut here, as at a collective
def _are_summed_later(parameters: tuple[torch.Tensor, ...], group: Group) -> bool:
    later = [parameter_record(parameter).sum_later for parameter in parameters]
    if None in later:
        return False
    for sum_over in later:
        assert sum_over is not None
        sum_over(group)
    return True
