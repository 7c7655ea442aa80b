"""Reduction of gradients: float32 buckets accumulate over microbatches and are summed over data-parallel ranks.

Nothing is divided here; see gradient_division.py.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.collectives import group_size, meet
from fused_megatron.collectives.transfers import start_all_reduce_, start_reduce_scatter_blocks
from fused_megatron.data_parallel.bucket_layout import BucketLayout, lay_out_buckets
from fused_megatron.data_parallel.row_blocks import RowBlocks
from fused_megatron.sharding import WHOLE_ROWS, RowShards, update_record

BUCKETS_UNDER_WAY = 2
"""Most copies of buckets at a time: one travels while the next is packed."""


class GradientBuckets:
    """Float32 gradients of all parameters, as views of a few flat buckets.

    The view of a parameter is the main_grad of its record: linear layers add their products directly to it, in float32
    and without a further pass. For float32 parameters `param.grad` is the view, too, so that autograd accumulates other
    gradients in it. For parameters of lower precision a hook adds other gradients to the view and frees them.
    A bucket holds parameters of one pipeline stage. It is summed over dp_group once a step: in reduce() of its stage or
    earlier, when the backwards announced by reduce_after_backwards() have filled it, while they continue with earlier
    layers. With one shard every rank gets all sums. With several shards a rank gets the sums of the rows that it owns,
    and its other rows have no meaning until zero_().

    Args:
        parameters: every trainable parameter in the order of forward, or such a list for each pipeline stage. A
            parameter of two stages (a tied weight) has one gradient.
        dp_group: data-parallel group, whose ranks must make their buckets at once; None for one rank.
        bucket_bytes: least size of a bucket; the last bucket of a stage may be smaller.
        rows: the rows of each parameter whose sums this rank needs; as many shards as dp_group has ranks, or one.

    Communication: one all-reduce (sum) for each bucket and step, 4 bytes an element in total; with several shards one
        reduce-scatter in its place. The loss is divided before backward, by the targets of all ranks
        (gradient_division.py).
    Memory: 4 bytes for each element of the parameters; with several shards two more buckets while they are sent.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter] | Mapping[int, Sequence[nn.Parameter]],
        dp_group: dist.ProcessGroup | None,
        bucket_bytes: float = 25e6,
        rows: RowShards = WHOLE_ROWS,
    ) -> None:
        assert rows.num_shards in (1, group_size(dp_group))
        self._dp_group, self.rows = dp_group, rows
        meet(dp_group)  # now, and not in a backward
        stages = parameters if isinstance(parameters, Mapping) else {0: parameters}
        layouts = lay_out_buckets(stages, bucket_bytes)
        self._queues = [_Queue(held_by, buckets, rows) for held_by, buckets in layouts.items()]
        self._views = {
            p: view for queue in self._queues for bucket in queue.buckets for p, view in bucket.views.items()
        }
        self._accumulators = []  # a reference keeps autograd's nodes alive, and with them their hooks
        for queue in self._queues:
            for bucket in queue.buckets:
                for parameter, view in bucket.views.items():
                    parameter.grad = view if parameter.dtype == torch.float32 else None
                    update_record(parameter, main_grad=view)
                    # A hook of the node: the parameter's own hook is not called if its gradient went to main_grad only.
                    # The node runs once in each backward, after every use of the parameter.
                    node = torch.autograd.graph.get_gradient_edge(parameter).node
                    node.register_hook(lambda *_, p=parameter, q=queue, b=bucket: self._accumulated(p, q, b))
                    self._accumulators.append(node)

    def __getitem__(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the float32 gradient of a parameter, in its shape."""
        return self._views[parameter]

    def by_name(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Return the float32 gradients of named parameters, in the rows that this rank owns, for the optimizer."""
        return {name: self.rows.own(self._views[parameter]) for name, parameter in parameters.items()}

    def in_order_of_forward(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each bucket; the buckets that forward reaches first come first."""
        queues = sorted(self._queues, key=lambda queue: min(queue.stages))
        return [list(bucket.views)[::-1] for queue in queues for bucket in reversed(queue.buckets)]

    def zero_(self) -> None:
        """Begin a step: set all gradients to 0."""
        for queue in self._queues:
            queue.begin()
            for bucket in queue.buckets:
                bucket.flat.zero_()

    def reduce_after_backwards(self, count: int) -> None:
        """Announce the number of backwards of each stage that remain in this step; the last one sends full buckets.

        Not for backwards that defer weight gradients.
        """
        if self._dp_group is None:
            return
        for queue in self._queues:
            # Buckets that two stages fill wait for both, whose backwards may come in different orders on the ranks.
            queue.overlap = len(queue.stages) == 1
            for bucket in queue.buckets:
                bucket.missing = dict.fromkeys(bucket.views, count)

    def reduce(self, stage: int = 0) -> Callable[[], None]:
        """Start to sum the remaining buckets of a stage, whose gradients are final; call the result to wait for them.

        Buckets of several stages are sent with the last of these stages. All ranks of dp_group must reduce their stages
        in the same order.
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
                    queue.work.pop(0)()

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
            # Buckets are sent in the same order on every rank, in whatever order their gradients are ready.
            while ready < len(queue.buckets) and not any(queue.buckets[ready].missing.values()):
                ready += 1
            queue.send(ready, self._dp_group)


class _Queue:
    """Buckets of the parameters that the same stages hold, in the order in which they are sent."""

    def __init__(self, stages: frozenset[int], layouts: Sequence[BucketLayout], rows: RowShards) -> None:
        self.stages = stages
        self.buckets = [_Bucket(layout, rows) for layout in layouts]
        self.work: list[Callable[[], object]] = []
        self.begin()

    def begin(self) -> None:
        self.waiting = set(self.stages)
        self.next_bucket = 0
        self.overlap = False

    def send(self, end: int, dp_group: dist.ProcessGroup) -> None:
        while self.next_bucket < end:
            bucket = self.buckets[self.next_bucket]
            # A reduce-scatter holds a copy of its bucket until it is waited for.
            if bucket.is_packed and len(self.work) >= BUCKETS_UNDER_WAY:
                self.work.pop(0)()
            self.work.append(bucket.start_sum(dp_group))
            self.next_bucket += 1


class _Bucket:
    """Flat float32 tensor, and the view of each parameter in it."""

    def __init__(self, layout: BucketLayout, rows: RowShards) -> None:
        device = layout.parameters[0].device
        self._blocks = RowBlocks([p.shape for p in layout.parameters], rows) if rows.num_shards > 1 else None
        self.flat = torch.zeros(layout.num_elements, dtype=torch.float32, device=device)
        self.views = layout.views(self.flat)
        self.missing: dict[nn.Parameter, int] = {}
        """Number of backwards that each parameter still waits for."""

    @property
    def is_packed(self) -> bool:
        """Whether the bucket is copied to be sent."""
        return self._blocks is not None

    def start_sum(self, dp_group: dist.ProcessGroup) -> Callable[[], object]:
        """Begin the sum over dp_group of all gradients, or of this rank's rows; the result waits for it."""
        if self._blocks is None:
            return start_all_reduce_(self.flat, dp_group).wait
        packing, views = self._blocks, list(self.views.values())
        blocks = packing.pack(views, packing.new_blocks(self.flat))
        block = self.flat.new_empty(packing.block_numel)
        transfer = start_reduce_scatter_blocks(blocks.view(-1), block, dp_group)
        return lambda: packing.unpack_own(transfer.wait(), views)
