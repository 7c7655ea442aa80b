"""Memory of the buckets in which backwards send gradients to the ranks with the same weights."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from fused_megatron.data_parallel.fixed_sizes import BUCKETS_UNDER_WAY, BYTES_PER_ELEMENT

DENSE, EXPERTS, TABLE, BEGUN_TABLE = "dense", "experts", "table", "begun table"
"""Kinds of gradients: of dense weights; of experts, which have other replicas and buckets of their own; of a vocabulary
table; and the part of the head in the gradient of a table to which the embedding will add."""


class Made(NamedTuple):
    """Gradients of weights that a moment of a backward makes: their number of elements, and their kind."""

    elements: int
    kind: str = DENSE


class Sending(NamedTuple):
    """How the ranks with the same weights sum their gradients.

    Attributes:
        bucket_bytes: least size of a bucket.
        shards, expert_shards: number of ranks that divide the sums of dense parameters, and of experts. One rank: the
            sums need no copy of a bucket.
        sharded: whether a whole gradient exists only until its bucket is sent (ZeRO stages 2 and 3).
        receives: whether the blocks of the other ranks arrive in memory of their own: gloo's do, NCCL's do not.
    """

    bucket_bytes: int
    shards: int
    expert_shards: int
    sharded: bool
    receives: bool

    @property
    def copies(self) -> bool:
        """Whether any bucket is sent from a copy."""
        return max(self.shards, self.expert_shards) > 1


UnderWay = tuple[int, ...]
"""Bytes of the buffers of each bucket that was sent and still waits, the oldest first."""


class SentBuckets(NamedTuple):
    """Buckets of a backward.

    Attributes:
        at_moments: bytes of whole gradients and of buckets under way at each moment of the backward.
        most_after: the most bytes while the last buckets leave, after the backward.
        under_way: the buckets that stay.
    """

    at_moments: tuple[int, ...]
    most_after: int
    under_way: UnderWay


@lru_cache(maxsize=2048)
def send_buckets(made: Sequence[Made], sending: Sending, under_way: UnderWay, early: bool) -> SentBuckets:
    """Follow the buckets of a stage through a backward.

    A bucket leaves when its last gradient is made. Its copy stays until the bucket after the next one needs its place,
    also if its sum is there. A reduce-scatter holds the copy, as many bytes that arrive (gloo), and the sum of this
    rank's rows.

    Args:
        made: the gradients of each moment.
        sending: rules of the buckets.
        under_way: buckets of earlier backwards.
        early: whether buckets leave during the backward; otherwise all leave after it.
    """
    waits = list(under_way)
    filling = {False: 0, True: 0}
    full: list[tuple[int, bool]] = []
    most_after = begun = 0
    at_moments = []
    shards = {False: sending.shards, True: sending.expert_shards}

    def whole() -> int:
        if not sending.sharded:
            return 0
        gradients = begun + sum(num_bytes for of_experts, num_bytes in filling.items() if shards[of_experts] > 1)
        return gradients + sum(num_bytes for num_bytes, of_experts in full if shards[of_experts] > 1)

    def leave(num_bytes: int, of_experts: bool) -> int:
        ranks = shards[of_experts]
        if (sending.sharded or ranks > 1) and len(waits) >= BUCKETS_UNDER_WAY:
            waits.pop(0)
        packing = sum(waits) + (2 if sending.sharded else 1) * num_bytes * (ranks > 1)
        waits.append((2 if sending.receives else 1) * num_bytes + num_bytes // ranks if ranks > 1 else 0)
        return max(packing, sum(waits))

    for elements, kind in made:
        of_experts = kind == EXPERTS
        if kind in (TABLE, BEGUN_TABLE):
            begun = BYTES_PER_ELEMENT * elements if kind == BEGUN_TABLE else 0
        filling[of_experts] += BYTES_PER_ELEMENT * elements if kind != BEGUN_TABLE else 0
        at_moments.append(sum(waits) + whole())
        if filling[of_experts] >= sending.bucket_bytes and elements:
            if early:
                leave(filling[of_experts], of_experts)
            else:
                full.append((filling[of_experts], of_experts))
            filling[of_experts] = 0
    full += [(num_bytes, of_experts) for of_experts, num_bytes in filling.items() if num_bytes]
    filling = {False: 0, True: 0}
    while full:
        num_bytes, of_experts = full.pop(0)
        most_after = max(most_after, leave(num_bytes, of_experts) + whole())
    return SentBuckets(tuple(at_moments), max(most_after, sum(waits)), tuple(waits))
