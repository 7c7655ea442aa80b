"""Start here when the memory of gradient buckets under way is wrong."""

import pytest

from fused_megatron.planning.bucket_memory import Made, Sending, send_buckets


@pytest.mark.parametrize(("receives", "buffers"), [(True, 2), (False, 1)])
def test_two_buckets_wait_with_their_copies_and_sums(receives: bool, buffers: int) -> None:
    """Of four ranks; only gloo needs room for the blocks of the other ranks."""
    sending = Sending(4000, 4, 1, sharded=False, receives=receives)
    sent = send_buckets((Made(1000), Made(1000), Made(1000)), sending, (), early=True)
    each = buffers * 4000 + 1000
    assert sent.under_way == (each, each) and sent.at_moments == (0, each, 2 * each)


def test_one_rank_sums_without_a_copy() -> None:
    sent = send_buckets((Made(1000),), Sending(4000, 1, 1, sharded=False, receives=True), (), early=True)
    assert sum(sent.under_way) == 0
