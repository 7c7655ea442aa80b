"""Start here when a message or an exchange of blocks between some ranks of a group is lost, or mixed up."""

import torch
import torch.distributed as dist

from fused_megatron.collectives.exchanges import exchange_blocks, start_message
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.testing import run_on_ranks


def messages_around(rank, ranks):
    """Send messages of several sizes to the next ranks at once; return what arrived, and what the ledger saw."""
    started = []
    with record_communication() as ledger:
        for hop in (1, 2):
            source, target = (rank - hop) % ranks, (rank + hop) % ranks
            outgoing = torch.full((3 * rank + hop,), float(10 * rank + hop))
            incoming = torch.empty(3 * source + hop)
            started.append(start_message((target, outgoing), (source, incoming), dist.group.WORLD))
        received = [transfer.wait() for transfer in started]
        # Rank 0 sends to rank 2 only, and the others do nothing.
        one = (2, torch.ones(5)) if rank == 0 else None
        last = start_message(one, (0, torch.zeros(5)) if rank == 2 else None, dist.group.WORLD).wait()
        start_message((0, torch.empty(0)), (0, torch.empty(0)), dist.group.WORLD).wait()
    return received, last, ledger.counts, ledger.elements


def test_messages_arrive_in_order_and_only_where_they_are_sent():
    for rank, (received, last, counts, elements) in enumerate(run_on_ranks(messages_around, 3)):
        for hop, message in zip((1, 2), received, strict=True):
            source = (rank - hop) % 3
            assert message.equal(torch.full((3 * source + hop,), float(10 * source + hop)))
        assert last.sum() == (5 if rank == 2 else 0)
        assert counts["send"] == 2 + (rank == 0) and counts["receive"] == 2 + (rank == 2)
        assert elements["send"] == 6 * rank + 3 + 5 * (rank == 0)


def exchange(rank, ranks, size):
    """Exchange a block [rows of the sender, member] and a number with the neighbours of this rank."""
    first = rank // size * size
    members = range(first, first + size)
    outgoing = [[torch.full((1 + rank % 2, member), 10.0 * rank + member), torch.tensor([rank])] for member in members]
    outgoing = [[block, number.float()] for block, number in outgoing]
    shapes = [[(1 + member % 2, rank), (1,)] for member in members]
    with record_communication() as ledger:
        received = exchange_blocks(outgoing, shapes, members, dist.group.WORLD)
    return received, ledger.elements


def test_neighbours_exchange_blocks_of_any_size():
    for size in (1, 2, 4):
        for rank, (received, elements) in enumerate(run_on_ranks(exchange, 4, size)):
            members = range(rank // size * size, rank // size * size + size)
            for member, (block, number) in zip(members, received, strict=True):
                assert block.equal(torch.full((1 + member % 2, rank), 10.0 * member + rank)) and number.item() == member
            sent = sum((1 + rank % 2) * member + 1 for member in members)
            assert elements == ({"all_to_all": sent} if size > 1 else {})


def equal_blocks(rank, ranks):
    outgoing = [[torch.full((2, 3), 10.0 * rank + member)] for member in range(ranks)]
    received = exchange_blocks(outgoing, [[(2, 3)]] * ranks, range(ranks), dist.group.WORLD)
    return [blocks[0][0, 0].item() for blocks in received]


def test_equal_blocks_of_a_whole_group():
    assert run_on_ranks(equal_blocks, 3) == [[10.0 * source + rank for source in range(3)] for rank in range(3)]
