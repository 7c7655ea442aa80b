"""Start here when a schedule deadlocks on strict channels, or passes where NCCL would hang."""

import time

import pytest
import torch
import torch.distributed as dist

from fused_megatron.checks import InputError
from fused_megatron.testing import run_on_ranks
from fused_megatron.testing.strict_channels import StrictChannelError, StrictChannels

# Longer than a message that can complete takes on a busy machine.
SOON_S = 0.3


def full(value, size=3):
    return torch.full((size,), float(value))


def rendezvous(rank, channels):
    """Nothing is buffered: a send is incomplete until the peer receives, and reads its data then."""
    mine = full(1)
    if rank == 0:
        sent = channels.send(mine, 1, "forward", 0)
        time.sleep(SOON_S)
        early = sent.is_completed()
        mine.fill_(5)
        dist.barrier()
        sent.wait()
        return early, sent.is_completed()
    dist.barrier()
    channels.receive(mine, 0, "forward", 0).wait()
    return mine.tolist()


def one_at_a_time(rank, channels):
    """A send does not begin before the previous send of its channel has ended, whatever other channels do."""
    if rank == 0:
        first, second = (channels.send(full(i), 1, "forward", i) for i in range(2))
        first.wait()
        back = full(0)
        channels.receive(back, 1, "backward", 7).wait()  # another channel does not wait
        time.sleep(SOON_S)
        early = second.is_completed()
        dist.barrier()
        second.wait()
        return early, back.tolist()
    got = full(0)
    channels.receive(got, 0, "forward", 0).wait()
    channels.send(full(9), 0, "backward", 7).wait()
    dist.barrier()
    channels.receive(got, 0, "forward", 1).wait()
    return got.tolist()


def swapped_receives(rank, channels):
    """Tags have no effect: each receive gets the first message sent."""
    if rank == 0:
        for message in [channels.send(full(i), 1, "forward", i) for i in (10, 11)]:
            message.wait()
        return None
    buffers = {tag: full(0) for tag in (11, 10)}
    for message in [channels.receive(buffers[tag], 0, "forward", tag) for tag in (11, 10)]:
        message.wait()
    return {tag: buffer[0].item() for tag, buffer in buffers.items()}, channels.crossed


def all_sorts(rank, channels):
    """Scalars, empty tensors, 16-bit tensors, slices of a tensor that requires a gradient."""
    tensors = [torch.tensor(3.5), torch.empty(0, 4), torch.arange(6, dtype=torch.bfloat16).view(2, 3)]
    tensors += [torch.arange(8.0, requires_grad=True)[4:], torch.tensor([True, False])]
    if rank == 0:
        messages = [channels.send(tensor, 1, "backward", 0) for tensor in tensors]
        [message.wait() for message in messages]
        return None
    buffers = [torch.zeros_like(tensor.detach()) for tensor in tensors]
    for buffer in buffers:
        channels.receive(buffer, 0, "backward", 0).wait()
    return [torch.equal(*pair) for pair in zip(buffers, tensors, strict=True)]


def refusals(rank, channels):
    for tensor, peer, direction in (
        (torch.zeros(2, 3).t(), 1 - rank, "forward"),
        (full(0), rank, "forward"),
        (full(0), 1 - rank, "down"),
    ):
        with pytest.raises(InputError):
            channels.send(tensor, peer, direction, 0)


def properties(rank, world_size):
    channels = StrictChannels(dist.group.WORLD)
    checks = (rendezvous, one_at_a_time, swapped_receives, all_sorts, refusals)
    return {check.__name__: check(rank, channels) for check in checks}


def crossing_sends(rank, world_size, both_ways):
    """Each rank sends first. On one channel both wait for a receive that is queued behind the send."""
    # A case that passes may take long on a busy machine; a case that fails does so after a second.
    channels = StrictChannels(dist.group.WORLD, timeout_s=1.0 if both_ways else 120.0, both_ways=both_ways)
    got = full(0)
    sent = channels.send(full(rank), 1 - rank, "forward", 4)
    received = channels.receive(got, 1 - rank, "forward", 4)
    try:
        received.wait()
        sent.wait()
        return got.tolist()
    except StrictChannelError as error:
        return str(error)


def waiting_for_each_other(rank, world_size):
    channels = StrictChannels(dist.group.WORLD, timeout_s=1.0)
    with pytest.raises(StrictChannelError, match=r"^deadlock: rank \d: receive from rank \d forward \(tag 2\)"):
        channels.receive(full(0), 1 - rank, "forward", 2).wait()


def wrong_size(rank, world_size):
    channels = StrictChannels(dist.group.WORLD)
    call = channels.send if rank == 0 else channels.receive
    first, second = call(full(0, 3 + rank), 1 - rank, "forward", 0), call(full(0), 1 - rank, "forward", 1)
    with pytest.raises(StrictChannelError, match="12 bytes were sent where 16 are received"):
        first.wait()
    with pytest.raises(StrictChannelError):  # a broken channel stays broken
        second.wait()


def test_the_properties_of_a_channel():
    sender, receiver = run_on_ranks(properties, 2)
    assert sender["rendezvous"] == (False, True) and receiver["rendezvous"] == [5.0] * 3
    assert sender["one_at_a_time"] == (False, [9.0] * 3) and receiver["one_at_a_time"] == [1.0] * 3
    assert receiver["swapped_receives"] == ({11: 10.0, 10: 11.0}, [(0, 10, 11), (0, 11, 10)])
    assert receiver["all_sorts"] == [True] * 5


def test_crossing_sends_deadlock_on_one_channel_and_pass_on_two():
    assert run_on_ranks(crossing_sends, 2, False) == [[1.0] * 3, [0.0] * 3]
    for rank, text in enumerate(run_on_ranks(crossing_sends, 2, True)):
        assert text.startswith(f"deadlock: rank {rank}: receive from rank {1 - rank} forward (tag 4) has not happened")
        assert f"queued on its channel: rank {rank}: send to rank {1 - rank} forward (tag 4)" in text


def test_ranks_that_wait_for_each_other_get_an_error():
    run_on_ranks(waiting_for_each_other, 2)


def test_a_size_that_is_not_the_other_sides_is_an_error_on_both():
    run_on_ranks(wrong_size, 2)
