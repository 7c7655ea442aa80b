"""Reduction of gradients: float32 buckets that accumulate over microbatches, and sums over data-parallel ranks.

This file only sums; gradient_division.py defines the division.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.collectives import meet
from fused_megatron.collectives.transfers import start_all_reduce_
from fused_megatron.data_parallel.bucket_layout import BucketLayout, lay_out_buckets
from fused_megatron.data_parallel.fixed_sizes import BUCKETS_UNDER_WAY
from fused_megatron.data_parallel.gradient_bucket import Bucket, ShardedBucket, WholeBucket
from fused_megatron.sharding import Replicas, update_record


class GradientBuckets:
    """Float32 gradients of all parameters, in buckets that are summed over the replicas of the parameters.

    Linear layers add their products directly to the main_grad of a parameter's record, in float32 and without a further
    pass. A hook adds gradients that autograd returns, and frees them. Whole float32 gradients are `param.grad`, so that
    autograd adds to them itself.

    A bucket holds parameters of one pipeline stage with the same replicas: dense ones, or experts. It is summed in
    reduce() of its stage or earlier, when the backwards announced by reduce_after_backwards() have filled it, while
    they continue with earlier layers. With one row shard every rank gets all sums. With several shards a rank gets the
    sums of the rows that it owns.

    Every rank sends the buckets of a stage in the same order, buckets of dense parameters and of experts together. So
    ranks cannot wait for each other in a circle.

    Whole gradients accumulate over a step and are summed once in it. Sharded gradients (sharded=True) are summed after
    every microbatch and accumulate as sums of this rank's rows, so that a whole gradient exists only until its bucket
    is sent.

    Gradients of which a tensor-parallel rank makes only its part (sharding.used_by_parts) are summed at the end of a
    step, all together, after the sums over the replicas.

    Args:
        parameters: every trainable parameter in the order of forward, or such a list for each pipeline stage. A
            parameter of two stages (a tied weight) has one gradient.
        replicas: of the parameters, with the rows whose sums this rank needs. All replicas must construct their buckets
            at the same time.
        bucket_bytes: least size of a bucket; the last bucket of a stage may be smaller.
        sharded: whether gradients are sharded while they accumulate.

    Communication: one all-reduce of 4 bytes an element for each bucket and step. With several shards a reduce-scatter
        of 4 bytes an element replaces it, in every step or (sharded) in every microbatch; and one all-reduce a step of
        a rank's rows over the ranks that own the same rows. One all-reduce a step of 4 bytes an element of the
        gradients that tensor-parallel ranks make by parts, in this rank's rows. The loss is divided before backward, by
        the targets of all ranks (gradient_division.py).
    Attributes:
        were_zeroed: whether an update has set the gradients to 0, and no backward has run since.

    Memory: 4 bytes for each element of the parameters, and two more buckets while they are sent. Sharded: 4 bytes for
        each element of a rank's rows, the gradients that wait for their bucket to be full, and two buckets.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter] | Mapping[int, Sequence[nn.Parameter]],
        replicas: Replicas,
        bucket_bytes: float = 25e6,
        sharded: bool = False,
    ) -> None:
        self.replicas, self._sharded = replicas, sharded
        for replica_set in replicas.sets:
            for group in (replica_set.shard_group, replica_set.copy_group):
                meet(group)  # the ranks connect now, and not in a backward
        stages = parameters if isinstance(parameters, Mapping) else {0: parameters}
        kind = ShardedBucket if sharded else WholeBucket

        def bucket(layout: BucketLayout) -> Bucket:
            return kind(layout, replicas.of(layout.parameters[0]))

        self._queues = [
            _Queue(held_by, [bucket(layout) for layout in layouts], sharded)
            for held_by, layouts in lay_out_buckets(stages, bucket_bytes, replicas.of).items()
        ]
        self._buckets = {p: bucket for queue in self._queues for bucket in queue.buckets for p in bucket.parameters}
        self._own = {p: bucket.own(p) for p, bucket in self._buckets.items()}
        self._parts: dict[nn.Parameter, dist.ProcessGroup] = {}  # the ranks that make a gradient by parts
        self.were_zeroed = False
        self._accumulators = []  # these references keep autograd's nodes and their hooks alive
        for queue in self._queues:
            for each in queue.buckets:
                for parameter in each.parameters:
                    parameter.grad = self._standing_grad(parameter)
                    update_record(
                        parameter,
                        main_grad=partial(each.total, parameter),
                        summed_grad=self._own[parameter],
                        sum_later=partial(self._parts.__setitem__, parameter),
                    )
                    # A hook of the node: the parameter's own hook is not called if its gradient went to main_grad only.
                    # The node runs once in each backward, after every use of the parameter.
                    node = torch.autograd.graph.get_gradient_edge(parameter).node
                    node.register_hook(lambda *_, p=parameter, q=queue, b=each: self._accumulated(p, q, b))
                    self._accumulators.append(node)

    def __getitem__(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the float32 gradient of a parameter, in the rows that this rank owns."""
        return self._own[parameter]

    def by_name(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Return the float32 gradients of named parameters, in the rows that this rank owns, for the optimizer."""
        return {name: self[parameter] for name, parameter in parameters.items()}

    def in_order_of_forward(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each bucket; the buckets that forward reaches first come first."""
        queues = sorted(self._queues, key=lambda queue: min(queue.stages))
        return [list(bucket.parameters)[::-1] for queue in queues for bucket in reversed(queue.buckets)]

    def zero_(self) -> None:
        """Begin a step: set all gradients to 0."""
        for queue in self._queues:
            queue.begin()
            for bucket in queue.buckets:
                bucket.zero_()

    def begin(self) -> None:
        """Begin a step as zero_(), without a pass over the gradients if the update before has set them to 0."""
        if not self.were_zeroed:
            self.zero_()
        for queue in self._queues:
            queue.begin()

    @property
    def has_own_only(self) -> bool:
        """Whether the rows that this rank owns are all that the buckets hold: an update can set all gradients to 0."""
        return all(bucket.is_own for queue in self._queues for bucket in queue.buckets)

    def reduce_after_backwards(self, count: int) -> None:
        """Announce how many backwards of each stage remain in this step; the last one sends buckets as they fill up.

        With sharded gradients every backward sends its full buckets. Do not announce backwards that defer weight
        gradients.
        """
        for queue in self._queues:
            if not any(bucket.is_sent for bucket in queue.buckets):
                continue
            # Buckets that two stages fill are sent in reduce(): the order of their backwards may differ between ranks.
            queue.announce(0 if len(queue.stages) > 1 else 1 if self._sharded else count)

    def reduce(self, stage: int = 0) -> Callable[[], None]:
        """Start to sum the remaining buckets of a stage; the returned function waits for them.

        Call it once in a step, when the gradients of the stage are final; with sharded gradients after every
        microbatch. Buckets of several stages are sent with the last of these stages. All replicas must reduce
        their stages in the same order.
        """
        touched = [queue for queue in self._queues if stage in queue.stages]
        for queue in touched:
            queue.reduce(stage)

        def wait() -> None:
            for queue in touched:
                queue.wait()

        return wait

    def finish(self) -> None:
        """Reduce all stages, and wait until every rank has the sums of its rows."""
        for wait in [self.reduce(stage) for stage in sorted({s for queue in self._queues for s in queue.stages})]:
            wait()
        self.finish_reduced()

    def finish_reduced(self) -> None:
        """Finish a step whose stages are reduced. Call it once: a second call would sum complete gradients again."""
        self.sum_copies()
        self._sum_parts()

    def sum_copies(self) -> None:
        """Sum the gradients over the ranks that own the same rows."""
        for wait in [bucket.sum_copies() for queue in self._queues for bucket in queue.buckets]:
            wait()

    def _sum_parts(self) -> None:
        """Sum the gradients that ranks made by parts, with one collective for each group of ranks."""
        by_group: dict[dist.ProcessGroup, list[torch.Tensor]] = {}
        for parameter, own in self._own.items():  # in the order of the buckets, which is the same on every rank
            if parameter in self._parts and own.numel():
                by_group.setdefault(self._parts[parameter], []).append(own)
        for group, rows in by_group.items():
            flat = torch.cat([own.reshape(-1) for own in rows])
            sums = start_all_reduce_(flat, group).wait().split([own.numel() for own in rows])
            torch._foreach_copy_(rows, [total.view_as(own) for total, own in zip(sums, rows, strict=True)])

    def _standing_grad(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Return the tensor to which autograd itself adds gradients of the parameter, if there is one."""
        if self._sharded or parameter.dtype != torch.float32:
            return None
        return self._buckets[parameter].total(parameter)

    def _accumulated(self, parameter: nn.Parameter, queue: "_Queue", bucket: Bucket) -> None:
        self.were_zeroed = False
        standing = self._standing_grad(parameter)
        if parameter.grad is not standing or standing is None:
            if parameter.grad is not None:  # low precision, sharded, or a caller that set .grad to None
                bucket.add(parameter, parameter.grad)
            parameter.grad = standing
        queue.accumulated(parameter, bucket)


class _Queue:
    """Buckets of parameters that the same stages hold, in the order in which they are sent.

    Args:
        stages: the stages that hold the parameters.
        buckets: buckets in the order in which backward fills them.
        repeats: whether the buckets are sent several times in a step.
    """

    def __init__(self, stages: frozenset[int], buckets: Sequence[Bucket], repeats: bool) -> None:
        self.stages = stages
        self.buckets = buckets
        self._repeats = repeats
        self._under_way: list[Callable[[], object]] = []
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self._reductions = dict.fromkeys(self.stages, 0)  # number of requested reductions that are not yet made
        self._next = 0
        self.announce(0)

    def announce(self, backwards: int) -> None:
        """Send a bucket before reduce(), after this number of backwards of each of its parameters; 0: never."""
        self._backwards = backwards
        for bucket in self.buckets:
            bucket.missing = dict.fromkeys(bucket.parameters, backwards)

    def accumulated(self, parameter: nn.Parameter, bucket: Bucket) -> None:
        """Count a backward of a parameter; send the buckets that are full."""
        if not self._backwards:
            return
        bucket.missing[parameter] -= 1
        ready = self._next
        # Every rank sends buckets in the same order, even if their gradients are ready in another order.
        while ready < len(self.buckets) and not any(self.buckets[ready].missing.values()):
            ready += 1
        self._send(ready)

    def reduce(self, stage: int) -> None:
        """Send the remaining buckets, once every stage has called this."""
        self._reductions[stage] += 1
        if not all(self._reductions.values()):
            return
        self._reductions = {other: count - 1 for other, count in self._reductions.items()}
        self._send(len(self.buckets))
        if self._repeats:
            self._next = 0
            self.announce(self._backwards)
        else:
            self._backwards = 0

    def wait(self) -> None:
        """Wait for all buckets that were sent."""
        while self._under_way:
            self._under_way.pop(0)()

    def _send(self, end: int) -> None:
        while self._next < end:
            bucket = self.buckets[self._next]
            # A reduce-scatter holds a packed copy of its bucket until wait().
            if bucket.is_packed and len(self._under_way) >= BUCKETS_UNDER_WAY:
                self._under_way.pop(0)()
            self._under_way.append(bucket.start_sum())
            self._next += 1
