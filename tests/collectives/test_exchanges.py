"""Start here when a message or an exchange of blocks between some ranks of a group is lost, or mixed up."""

import os
import random

import torch
import torch.distributed as dist

from fused_megatron.collectives import is_shared, meet
from fused_megatron.collectives.exchanges import exchange_blocks, start_message, start_row_exchange
from fused_megatron.collectives.transport import host_ring
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


def uneven_rows(rank, ranks):
    """Exchange rows over shared memory, and over gloo; several exchanges under way, waits in another order."""
    host_ring.RING_BYTES, host_ring.PIECE_BYTES = 1 << 16, 1 << 14  # so that little data wraps around the ring often
    shared, other = dist.new_group(), dist.new_group()
    meet(shared)
    os.environ["FUSED_MEGATRON_SHARED_MEMORY"] = "off"
    meet(other)
    assert is_shared(shared, torch.empty(0)) and not is_shared(other, torch.empty(0))
    draw, faults = random.Random(0), []
    for group in (shared, other, shared):
        started = []
        for _ in range(12):
            shape, dtype = draw.choice([(), (3,), (4, 5)]), draw.choice([torch.float32, torch.bfloat16, torch.int64])
            longest = draw.choice([0, 1, 40, 900])
            sizes = [[draw.choice([0, draw.randint(0, longest), longest]) for _ in range(ranks)] for _ in range(ranks)]
            if draw.random() < 0.3:
                sizes[draw.randrange(ranks)] = [0] * ranks  # a rank that sends nothing
            every = [
                [torch.full((n, *shape), 10.0 * i + j).to(dtype) for j, n in enumerate(of_rank)]
                for i, of_rank in enumerate(sizes)
            ]
            for blocks in every:
                for block in blocks:
                    block += torch.arange(len(block)).view(-1, *(1 for _ in shape)).to(dtype)
            wanted = torch.cat([of_rank[rank] for of_rank in every])
            started.append((start_row_exchange(torch.cat(every[rank]), sizes, group), wanted))
        draw.shuffle(started)
        faults += [1 for transfer, wanted in started if not torch.equal(transfer.wait(), wanted)]
    return faults


def test_rows_go_to_their_ranks_in_any_number():
    for ranks in (2, 3):
        assert run_on_ranks(uneven_rows, ranks) == [[]] * ranks


def disagreeing_sizes(rank, ranks):
    sizes = [[1, 2], [0, rank]]
    try:
        start_row_exchange(torch.ones(sum(sizes[rank]), 2), sizes, dist.group.WORLD).wait()
    except RuntimeError as error:
        return str(error)


def test_ranks_that_disagree_on_the_numbers_of_rows_say_so():
    for error in run_on_ranks(disagreeing_sizes, 2, timeout_s=20):
        assert "rank 0 has exchange of 24 bytes" in error and "rank 1 has exchange of 32 bytes" in error
