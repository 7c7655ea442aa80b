"""Gradients in fp32: flat buckets that accumulate over microbatches and are summed over data-parallel ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


class GradientBuckets:
    """Keeps the fp32 gradient of every parameter as a view of a few flat buckets.

    Every parameter gets its view as `main_grad`: the linear layers add their products straight into it, in fp32 and
    with no pass of their own. Autograd accumulates what else fp32 parameters get straight into the views
    (`param.grad` is the view); other gradients of lower-precision parameters are added to theirs by a hook and freed.
    In the last microbatch each bucket is all-reduced over dp_group as soon as its gradients are there, while backward
    goes on with earlier layers.

    Args:
        parameters: every trainable parameter, in the order of forward.
        dp_group: data-parallel group; None means one rank.
        bucket_bytes: least size of a bucket; the last may be smaller.

    Communication:
        One all-reduce per bucket and step, 4 bytes per parameter in all, SUM: the caller divides the loss by the
        global token count.

    Memory:
        4 bytes per parameter.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], dp_group: dist.ProcessGroup | None, bucket_bytes: float = 25e6
    ) -> None:
        self._dp_group = dp_group
        # Backward reaches the last layers first, so buckets are cut from the end.
        self._buckets = [_Bucket(group) for group in _cut(list(reversed(parameters)), bucket_bytes)]
        self._views = {p: view for bucket in self._buckets for p, view in bucket.views.items()}
        self._overlap = False
        self._next_bucket = 0
        self._work: list[dist.Work] = []
        self._accumulators = []  # autograd's nodes live, with their hooks, as long as someone holds them
        for bucket in self._buckets:
            for parameter, view in bucket.views.items():
                parameter.grad = view if parameter.dtype == torch.float32 else None
                parameter.main_grad = view  # type: ignore[attr-defined]
                # The node's hook, since a parameter's own is not called when all of its gradient went to main_grad.
                # The node runs once a backward, after every use of the parameter.
                node = torch.autograd.graph.get_gradient_edge(parameter).node
                node.register_hook(lambda *_, p=parameter, b=bucket: self._accumulated(p, b))
                self._accumulators.append(node)

    def __getitem__(self, parameter: nn.Parameter) -> torch.Tensor:
        """The fp32 gradient of a parameter, in its shape."""
        return self._views[parameter]

    def zero_(self) -> None:
        """Start a step."""
        for bucket in self._buckets:
            bucket.flat.zero_()

    def reduce_during_next_backward(self) -> None:
        """Say that the next backward is the last of the step, so that finished buckets may be sent."""
        self._overlap = self._dp_group is not None
        self._next_bucket = 0
        for bucket in self._buckets:
            bucket.missing = set(bucket.views)

    def finish(self) -> None:
        """Send what is left and wait until every bucket holds the sum over data-parallel ranks."""
        if self._dp_group is None:
            return
        self._send(len(self._buckets))
        for work in self._work:
            work.wait()
        self._work.clear()
        self._overlap = False

    def _accumulated(self, parameter: nn.Parameter, bucket: "_Bucket") -> None:
        view = bucket.views[parameter]
        if parameter.grad is not view:
            if parameter.grad is not None:  # low precision, or a caller that set .grad to None
                view.add_(parameter.grad)
            parameter.grad = view if parameter.dtype == torch.float32 else None
        if self._overlap:
            bucket.missing.discard(parameter)
            ready = self._next_bucket
            # In the same order on every rank, whatever order their gradients came in.
            while ready < len(self._buckets) and not self._buckets[ready].missing:
                ready += 1
            self._send(ready)

    def _send(self, end: int) -> None:
        while self._next_bucket < end:
            flat = self._buckets[self._next_bucket].flat
            work = dist.all_reduce(flat, group=self._dp_group, async_op=True)
            assert work is not None
            self._work.append(work)
            self._next_bucket += 1


class _Bucket:
    """One flat fp32 tensor and the view of it that each parameter owns."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        device = parameters[0].device
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float32, device=device)
        pieces = self.flat.split([p.numel() for p in parameters])
        self.views = {p: piece.view(p.shape) for p, piece in zip(parameters, pieces, strict=True)}
        self.missing: set[nn.Parameter] = set()


def _cut(parameters: Sequence[nn.Parameter], bucket_bytes: float) -> list[list[nn.Parameter]]:
    groups: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        if size >= bucket_bytes:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += 4 * parameter.numel()
    return [group for group in groups if group]
