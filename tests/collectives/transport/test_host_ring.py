"""Start here when ranks of one host get wrong numbers or hang: values and bits, reuse of slots, faults."""

import os
import random
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fused_megatron.collectives import is_shared, meet
from fused_megatron.collectives.transfers import Transfer, start_all_gather, start_all_reduce_
from fused_megatron.collectives.transport import host_ring
from fused_megatron.collectives.transport.select import start
from fused_megatron.testing import run_on_ranks
from fused_megatron.testing.run_on_ranks import RankError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8)


def of_ranks(ranks, size, dtype, seed):
    """Return the inputs of all ranks, [ranks, size], the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return torch.randint(0, 50, (ranks, size), generator=generator).to(dtype)
    return (1e3 * torch.randn(ranks, size, generator=generator, dtype=torch.float64)).to(dtype)


def sum_in_order(parts):
    wide = parts.float() if parts.dtype in (torch.bfloat16, torch.float16) else parts
    total = wide[0].clone()
    for part in wide[1:]:
        total += part
    return total.to(parts.dtype)


def check_collectives(rank, ranks, size, dtype, seed):
    group, whole = dist.group.WORLD, of_ranks(ranks, ranks * size, dtype, seed)
    x = whole[rank].clone()

    def started(collective, *buffers):
        return Transfer(start(collective, group, *buffers), buffers)

    reduced = started(dist.all_reduce, x.clone())
    gathered = started(dist.all_gather_single, x.new_empty(ranks * x.numel()), x)
    exchanged = started(dist.all_to_all_single, torch.empty_like(x), x)
    scattered = started(dist.reduce_scatter_single, x.new_empty(size), x)
    # Waits come in another order than starts.
    assert torch.equal(scattered.wait(), sum_in_order(whole.view(ranks, ranks, size)[:, rank]))
    assert torch.equal(exchanged.wait(), whole.view(ranks, ranks, size)[:, rank].reshape(-1))
    assert torch.equal(gathered.wait(), whole.view(-1))
    assert torch.equal(reduced.wait(), sum_in_order(whole))
    assert torch.equal(x, whole[rank]), "what was given was written"


def collectives(rank, ranks):
    host_ring.RING_BYTES, host_ring.PIECE_BYTES = 1 << 16, 1 << 14  # so that little data wraps around the ring often
    group = dist.group.WORLD
    with torch.inference_mode():  # memory that is mapped here must be writable outside, too
        assert not is_shared(group, torch.empty(0))
        meet(group)
        assert is_shared(group, torch.empty(0)) and not is_shared(group, torch.empty(0, device="meta"))
    for seed, (size, dtype) in enumerate((size, dtype) for dtype in DTYPES for size in (0, 1, 67, 5000)):
        check_collectives(rank, ranks, size, dtype, seed)
    # A tensor larger than a piece, and one larger than the ring.
    check_collectives(rank, ranks, 3000, torch.float64, 1)
    check_collectives(rank, ranks, 50021, torch.uint8, 2)
    # Enough collectives under way that slots are reused before the first wait.
    whole = of_ranks(ranks, 9 * 2000, torch.float32, 3)
    transfers = [start_all_reduce_(part.clone(), group) for part in whole[rank].split(2000)]
    transfers += [start_all_gather(part, 0, group) for part in whole[rank].split(2000)]
    wanted = [sum_in_order(part) for part in whole.split(2000, dim=1)]
    wanted += [part.reshape(-1) for part in whole.split(2000, dim=1)]
    assert all(torch.equal(t.wait(), w) for t, w in reversed(list(zip(transfers, wanted, strict=True))))
    # Each rank is late in turn, while slots are reused.
    late, shared = random.Random(rank), random.Random(0)
    for seed in range(40):
        time.sleep(late.choice((0.0, 0.0, 0.002)))
        check_collectives(rank, ranks, shared.choice((1, 300, 3000)), torch.float32, 100 + seed)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_collective(ranks):
    run_on_ranks(collectives, ranks, timeout_s=300)


def slow(rank, ranks):
    group = dist.new_group(timeout=timedelta(seconds=3.0))
    meet(group)
    assert is_shared(group, torch.empty(0))
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["rank 0 has given up"])
        return None
    with pytest.raises(RuntimeError) as caught:
        start_all_reduce_(torch.ones(4), group).wait()
    store.set("rank 0 has given up", "1")
    return str(caught.value)


def test_a_rank_that_does_not_come():
    message = "rank 1 did not come within 3 s, in a collective through shared memory"
    assert run_on_ranks(slow, 2) == [message, None]


def dies(rank, ranks):
    for _ in range(3):
        start_all_reduce_(torch.ones(4), dist.group.WORLD).wait()
    if rank == 2:
        os._exit(3)
    start_all_reduce_(torch.ones(4), dist.group.WORLD).wait()


def test_a_rank_that_dies_is_named():
    with pytest.raises(RankError, match="rank 2 died with exit code 3") as info:
        run_on_ranks(dies, 3)
    assert info.value.silent == () and set(info.value.errors) == {0, 1}
    assert "rank 2 is gone" in str(info.value.errors[0]) + str(info.value.errors[1])


def test_messages_in_parts():
    """Read messages in parts, as a stream socket may deliver them."""
    ours, theirs = host_ring.socket.socketpair()
    rings = [torch.zeros(host_ring.RING_BYTES, dtype=torch.uint8) for _ in range(2)]
    ring = host_ring.HostRing(0, [0, 1], rings, {1: ours}, 5.0)
    taken = []
    ring.begin("all_reduce", torch.arange(3.0))
    said = ring._collective
    piece = ring.write([torch.arange(3.0)], taken.extend)
    assert theirs.recv(100) == host_ring._MESSAGE.pack(1, 0, *said)
    rings[1][:12].view(torch.float32).copy_(torch.ones(3))
    message = host_ring._MESSAGE.pack(1, 0, *said) + host_ring._MESSAGE.pack(2, 1, *said)
    theirs.send(message[:5])
    ring._receive(1)
    assert ring._their_counts[1] == (0, 0)
    theirs.send(message[5:])
    piece.wait()
    piece.wait()  # once is enough
    assert [t.tolist() for t in taken] == [[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]]
    assert ring._their_counts[1] == (2, 1)
    theirs.close()
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        for _ in range(3):
            ring.write([torch.arange(3.0)], taken.extend).wait()


def start_each(collectives, group):
    """Start all collectives, wait for them from last to first, and return the text of the error."""
    transfers = []
    try:
        for collective, x in collectives:
            buffers = (x,) if collective is dist.all_reduce else (x.new_empty(group.size() * x.numel()), x)
            transfers.append(Transfer(start(collective, group, *buffers), buffers))
        for transfer in reversed(transfers):
            transfer.wait()
    except RuntimeError as error:
        return str(error)


def disagreements(rank, ranks):
    one, two, half = torch.ones(4), torch.ones(8), torch.ones(8, dtype=torch.bfloat16)
    reduce, gather = dist.all_reduce, dist.all_gather_single
    cases = [
        ([(reduce, one)], [(reduce, two)]),
        ([(reduce, one)], [(reduce, half)]),
        ([(reduce, one)], [(gather, one)]),
        ([(reduce, one), (gather, two)], [(gather, two), (reduce, one)]),
        ([(reduce, one[:0]), (reduce, one)], [(reduce, one)]),
        # Only the first differs, in so many bytes that the slot of the second differs, too; the second is taken first.
        ([(reduce, one), (reduce, two)], [(reduce, torch.ones(400)), (reduce, two)]),
    ]
    groups = [dist.new_group() for _ in cases]
    errors = [start_each(of_rank[rank > 0], group) for of_rank, group in zip(cases, groups, strict=True)]
    # The group raises again, and other groups work.
    assert "ranks disagree" in start_each([(reduce, one)], groups[0])
    assert start_each([(reduce, torch.ones(4))], dist.group.WORLD) is None
    return errors


def test_ranks_that_disagree():
    """Differ in kind, dtype, bytes or order: every rank reports both collectives, and no piece is taken."""
    every = run_on_ranks(disagreements, 3, timeout_s=60)
    of_float = "all_reduce of 16 bytes of float32"
    others = [
        (of_float, 0, "all_reduce of 32 bytes of float32", 0),
        (of_float, 0, "all_reduce of 16 bytes of bfloat16", 0),
        (of_float, 0, "all_gather of 16 bytes of float32", 0),
        (of_float, 0, "all_gather of 32 bytes of float32", 0),
        (of_float, 1, of_float, 0),
        (of_float, 0, "all_reduce of 1600 bytes of float32", 0),
    ]
    for rank, errors in enumerate(every):
        for error, (first, n, second, m) in zip(errors, others, strict=True):
            wanted = (
                f"rank 0 has {first} (its number {n} there), rank {max(rank, 1)} has {second} (its number {m} there)"
            )
            assert wanted in error


def uses_elsewhere(rank, ranks):
    group, errors = dist.group.WORLD, []

    def use():
        try:
            return start_all_reduce_(torch.ones(4), group).wait().tolist()
        except RuntimeError as error:
            return str(error)

    assert use() == [2.0] * 4
    thread = threading.Thread(target=lambda: errors.append(use()), name="loader")
    thread.start()
    thread.join()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, str(use()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    errors.append(os.read(reading, 1000).decode())
    assert use() == [2.0] * 4
    # A thread may continue after another has ended.
    other, sums = dist.new_group(), []
    meet(other)
    for _ in range(2):
        thread = threading.Thread(target=lambda: sums.append(start_all_reduce_(torch.ones(1), other).wait().item()))
        thread.start()
        thread.join()
    assert sums == [2.0, 2.0]
    return errors


def test_a_thread_or_a_forked_child_cannot_use_the_group():
    for rank, (thread, child) in enumerate(run_on_ranks(uses_elsewhere, 2)):
        assert thread.startswith(f"thread 'loader' of rank {rank} uses a process group that thread 'MainThread' uses")
        assert child.startswith(f"this process was forked from rank {rank} and cannot use its process group")
