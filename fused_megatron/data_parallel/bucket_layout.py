"""Layout of gradients in flat buckets, without memory or communication."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fused_megatron.data_parallel.fixed_sizes import BYTES_PER_ELEMENT, aligned


@dataclass(frozen=True)
class BucketLayout:
    """Parameters of one bucket, whose gradients follow each other in a flat tensor, each from an aligned address.

    Attributes:
        parameters: parameters in the order of their gradients, which is the order in which backward reaches them.
    """

    parameters: tuple[nn.Parameter, ...]

    @property
    def num_elements(self) -> int:
        return sum(aligned(parameter.numel()) for parameter in self.parameters)

    def offsets(self) -> dict[nn.Parameter, int]:
        """Return the offset of each parameter's gradient, in elements."""
        found, offset = {}, 0
        for parameter in self.parameters:
            found[parameter] = offset
            offset += aligned(parameter.numel())
        return found

    def views(self, flat: torch.Tensor) -> dict[nn.Parameter, torch.Tensor]:
        """Return views of a flat tensor [num_elements]: the part of each parameter, in the parameter's shape."""
        return {p: flat[begin : begin + p.numel()].view(p.shape) for p, begin in self.offsets().items()}


def lay_out_buckets(
    stages: Mapping[int, Sequence[nn.Parameter]],
    bucket_bytes: float,
    kind: Callable[[nn.Parameter], Hashable] = lambda parameter: None,
) -> dict[frozenset[int], list[BucketLayout]]:
    """Assign parameters to buckets.

    Args:
        stages: the parameters of each pipeline stage, in the order of forward. A tied weight is a parameter of several
            stages, and has one gradient.
        bucket_bytes: least size of a bucket; the last bucket of each kind may be smaller.
        kind: returns the kind of a parameter; a bucket holds parameters of one kind.

    Returns:
        For each set of stages: the buckets of parameters that exactly these stages hold, in the order in which backward
        fills them.
    """
    holders: dict[nn.Parameter, set[int]] = {}
    for stage, parameters in stages.items():
        for parameter in parameters:
            holders.setdefault(parameter, set()).add(stage)
    groups: dict[frozenset[int], list[nn.Parameter]] = {}
    for parameter, held_by in holders.items():
        groups.setdefault(frozenset(held_by), []).append(parameter)
    # Backward reaches the last layers first, so buckets are cut from the end.
    return {held_by: _cut(group[::-1], bucket_bytes, kind) for held_by, group in groups.items()}


def _cut(
    parameters: Sequence[nn.Parameter], bucket_bytes: float, kind: Callable[[nn.Parameter], Hashable]
) -> list[BucketLayout]:
    """Cut parameters into buckets, in the order of the last parameter of each bucket: the order in which they fill."""
    full: list[list[nn.Parameter]] = []
    filling: dict[Hashable, list[nn.Parameter]] = {}
    for parameter in parameters:
        of_kind = kind(parameter)
        bucket = [*filling.pop(of_kind, []), parameter]
        if BYTES_PER_ELEMENT * sum(p.numel() for p in bucket) >= bucket_bytes:
            full.append(bucket)
        else:
            filling[of_kind] = bucket  # the last of the dict: its last parameter is the latest
    return [BucketLayout(tuple(bucket)) for bucket in (*full, *filling.values())]
