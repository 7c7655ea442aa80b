"""Reduction of gradients: fp32 buckets accumulate over microbatches and are summed over data-parallel ranks.

Nothing is divided here (gradient_division.py).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.collectives import meet
from fused_megatron.collectives.transfers import Transfer, start_all_reduce_
from fused_megatron.data_parallel.bucket_layout import BucketLayout, lay_out_buckets
from fused_megatron.sharding import update_record


class GradientBuckets:
    """Keeps the fp32 gradient of every parameter as a view of a few flat buckets.

    Every parameter's record gets its view as main_grad: the linear layers add their products straight into it, in fp32
    and with no pass of their own. Autograd accumulates what else fp32 parameters get straight into the views
    (`param.grad` is the view); other gradients of lower-precision parameters are added to theirs by a hook and freed.
    A bucket holds parameters of one pipeline stage and is all-reduced over dp_group once a step, in reduce() of its
    stage; or before, as soon as the backwards that reduce_after_backwards() announced have filled it, while they go on
    with earlier layers.

    Args:
        parameters: every trainable parameter, in the order of forward; of several pipeline stages those of each. A
            parameter of two stages (a tied weight) has one gradient.
        dp_group: data-parallel group, whose ranks make theirs at once; None means one rank.
        bucket_bytes: least size of a bucket; the last of a stage may be smaller.

    Communication:
        One all-reduce per bucket and step, 4 bytes per parameter in all, SUM: the loss is divided before backward, by
        the targets of all ranks (gradient_division.py).

    Memory:
        4 bytes per parameter.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter] | Mapping[int, Sequence[nn.Parameter]],
        dp_group: dist.ProcessGroup | None,
        bucket_bytes: float = 25e6,
    ) -> None:
        self._dp_group = dp_group
        meet(dp_group)  # its ranks meet here, and not in a backward
        stages = parameters if isinstance(parameters, Mapping) else {0: parameters}
        layouts = lay_out_buckets(stages, bucket_bytes)
        self._queues = [_Queue(held_by, buckets) for held_by, buckets in layouts.items()]
        self._views = {
            p: view for queue in self._queues for bucket in queue.buckets for p, view in bucket.views.items()
        }
        self._accumulators = []  # autograd's nodes live, with their hooks, as long as someone holds them
        for queue in self._queues:
            for bucket in queue.buckets:
                for parameter, view in bucket.views.items():
                    parameter.grad = view if parameter.dtype == torch.float32 else None
                    update_record(parameter, main_grad=view)
                    # The node's hook, since a parameter's own is not called when all of its gradient went to main_grad.
                    # The node runs once a backward, after every use of the parameter.
                    node = torch.autograd.graph.get_gradient_edge(parameter).node
                    node.register_hook(lambda *_, p=parameter, q=queue, b=bucket: self._accumulated(p, q, b))
                    self._accumulators.append(node)

    def __getitem__(self, parameter: nn.Parameter) -> torch.Tensor:
        """The fp32 gradient of a parameter, in its shape."""
        return self._views[parameter]

    def by_name(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """The fp32 gradients of named parameters, as the optimizer wants them."""
        return {name: self._views[parameter] for name, parameter in parameters.items()}

    def zero_(self) -> None:
        """Start a step."""
        for queue in self._queues:
            queue.begin()
            for bucket in queue.buckets:
                bucket.flat.zero_()

    def reduce_after_backwards(self, count: int) -> None:
        """Say that so many backwards of each stage are left in this step: the last one may send what it has filled.

        Not for backwards that put weight gradients off.
        """
        if self._dp_group is None:
            return
        for queue in self._queues:
            # One that two stages fill waits for both; and their backwards need not come in one order on all ranks.
            queue.overlap = len(queue.stages) == 1
            for bucket in queue.buckets:
                bucket.missing = dict.fromkeys(bucket.views, count)

    def reduce(self, stage: int = 0) -> Callable[[], None]:
        """Send what is left of a stage, whose gradients are final; call the result to wait for the sums.

        What several stages hold is sent for the last of them. All ranks of dp_group reduce their stages in one order.
        """
        touched = [queue for queue in self._queues if stage in queue.stages]
        for queue in touched:
            queue.overlap = False
            queue.waiting.discard(stage)
            if not queue.waiting and self._dp_group is not None:
                queue.send(len(queue.buckets), self._dp_group)

        def wait() -> None:
            for queue in touched:
                while queue.work:
                    queue.work.pop(0).wait()

        return wait

    def finish(self) -> None:
        """Reduce all stages, and wait until every bucket holds the sum over data-parallel ranks."""
        for wait in [self.reduce(stage) for stage in sorted({s for queue in self._queues for s in queue.stages})]:
            wait()

    def _accumulated(self, parameter: nn.Parameter, queue: "_Queue", bucket: "_Bucket") -> None:
        view = bucket.views[parameter]
        if parameter.grad is not view:
            if parameter.grad is not None:  # low precision, or a caller that set .grad to None
                view.add_(parameter.grad)
            parameter.grad = view if parameter.dtype == torch.float32 else None
        if queue.overlap:
            assert self._dp_group is not None
            bucket.missing[parameter] -= 1
            ready = queue.next_bucket
            # In the same order on every rank, whatever order their gradients came in.
            while ready < len(queue.buckets) and not any(queue.buckets[ready].missing.values()):
                ready += 1
            queue.send(ready, self._dp_group)


class _Queue:
    """The buckets of the parameters that the same stages hold, in the order in which they are sent."""

    def __init__(self, stages: frozenset[int], layouts: Sequence[BucketLayout]) -> None:
        self.stages = stages
        self.buckets = [_Bucket(layout) for layout in layouts]
        self.work: list[Transfer] = []
        self.begin()

    def begin(self) -> None:
        self.waiting = set(self.stages)
        self.next_bucket = 0
        self.overlap = False

    def send(self, end: int, dp_group: dist.ProcessGroup) -> None:
        while self.next_bucket < end:
            self.work.append(start_all_reduce_(self.buckets[self.next_bucket].flat, dp_group))
            self.next_bucket += 1


class _Bucket:
    """One flat fp32 tensor and the view of it that each parameter owns."""

    def __init__(self, layout: BucketLayout) -> None:
        device = layout.parameters[0].device
        self.flat = torch.zeros(layout.num_elements, dtype=torch.float32, device=device)
        self.views = layout.views(self.flat)
        self.missing: dict[nn.Parameter, int] = {}
        """How many backwards each parameter is still to take part in."""
