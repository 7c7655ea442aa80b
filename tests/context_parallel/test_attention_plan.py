"""Start here when context-parallel attention sends or keeps more bytes than its formula, or waits too early."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from fused_megatron.context_parallel import METHODS, context_parallel_attention, exchange_size, partition_for
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.observe.waits import observed_by
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.testing import run_cases_on_ranks, run_on_ranks

B, N, D, DV = 2, 8, 4, 6
MASKS = {
    "causal": (96, AttentionMask(causal=True)),
    "uneven": (97, AttentionMask(causal=True)),
    "window": (96, AttentionMask(causal=True, window=7)),
    "documents": (90, AttentionMask(causal=True, documents=torch.tensor([0, 1, 30, 70, 90, 95, 130, 131, 180]))),
    "both directions": (64, AttentionMask()),
    "long, window": (2000, AttentionMask(causal=True, window=7)),
}


def needed_rows(mask, seq_len, own, others):
    """Count the positions of `others` that a query at `own` sees in some sample: pair by pair."""
    documents = mask.documents if mask.documents is not None else torch.arange(B + 1) * seq_len
    document = (torch.arange(B * seq_len)[:, None] >= documents).sum(1).view(B, seq_len)
    seen = document[:, own, None] == document[:, None, others]
    if mask.causal:
        distance = own[:, None] - others
        seen = seen & (distance >= 0) & (distance < (mask.window or seq_len))
    return int(seen.any(0).any(0).sum())


def attend_once(rank, ranks, name, method, kv_heads):
    """Run forward and backward; return the entries of each ledger and the bytes that forward keeps."""
    seq_len, mask = MASKS[name]
    partition = partition_for(method, mask, B, seq_len, ranks, num_heads=N, num_kv_heads=kv_heads)
    rows, kept = partition.sizes[rank], {}
    leaves = [torch.randn(rows, B, h, d, requires_grad=True) for h, d in ((N, D), (kv_heads, D), (kv_heads, DV))]

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with record_communication() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        context = context_parallel_attention(*leaves, mask, partition=partition, method=method, group=dist.group.WORLD)
    with record_communication() as backward:
        context.backward(torch.randn_like(context))
    ledgers = [[(entry.kind, entry.elements) for entry in ledger.entries] for ledger in (forward, backward)]
    return *ledgers, sum(kept.values()), [layout.positions() for layout in partition.layouts]


def rows_of_ring(name, positions, rank, neighbours):
    """Return, for each hop, the rows that the rank's member of the ring sends, and the rows that it receives."""
    seq_len, mask = MASKS[name]
    members = [torch.cat(positions[i : i + neighbours]) for i in range(0, len(positions), neighbours)]
    me, count = rank // neighbours, len(members)
    hops = range(1, count)
    sent = [needed_rows(mask, seq_len, members[(me + hop) % count], members[me]) for hop in hops]
    return sent, [needed_rows(mask, seq_len, members[me], members[(me - hop) % count]) for hop in hops]


def messages(entries, kind):
    return [elements for found, elements in entries if found == kind]


CASES = [(name, method, N) for name in list(MASKS)[:-1] for method in METHODS]
CASES += [("causal", method, 2) for method in ("ring", "all_to_all", "all_to_all+ring")]


@cache
def results_of_cases(ranks):
    return run_cases_on_ranks(attend_once, ranks, CASES)


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_the_formula_of_each_method(ranks):
    for (name, method, kv_heads), results in zip(CASES, results_of_cases(ranks), strict=True):
        neighbours = exchange_size(method, ranks, N, kv_heads)
        row = B * kv_heads * (D + DV)  # elements of the keys and values of a position
        for rank, (forward, backward, _, positions) in enumerate(results):
            own, most = len(positions[rank]), max(map(len, positions))
            if method == "all_gather":
                assert forward == [("all_gather", ranks * most * row)]
                assert backward == [*forward, ("reduce_scatter", ranks * most * row)]
                continue
            first = rank // neighbours * neighbours
            group = sum(map(len, positions[first : first + neighbours]))
            copies = max(neighbours, kv_heads) // kv_heads
            if neighbours > 1:
                exchanged = [own * (B * N * D + row * copies), group * B * N * DV // neighbours]
                assert messages(forward, "all_to_all") == exchanged
                back = [own * B * N * DV, group * (B * N * D + row * copies) // neighbours]
                back[0] += own * row * copies if copies > 1 else 0
                assert messages(backward, "all_to_all") == back
            sent, received = rows_of_ring(name, positions, rank, neighbours)
            each = row * copies // neighbours
            assert messages(forward, "send") == [rows * each for rows in sent if rows]
            assert sorted(messages(backward, "send")) == sorted(rows * each for rows in sent + received if rows)
            assert sorted(messages(backward, "receive")) == sorted(rows * each for rows in sent + received if rows)
            assert len(forward) == len(messages(forward, "all_to_all")) + sum(map(bool, sent + received))


def test_forward_keeps_a_share_of_what_one_rank_keeps():
    for (name, method, kv_heads), results in zip(CASES, results_of_cases(4), strict=True):
        numbers = B * (N * D + kv_heads * (D + DV) + N * DV) + B * N  # query, key, value, context, log-sum-exp
        total = sum(kept for *_, kept, _ in results)
        assert total == 4 * MASKS[name][0] * numbers, (name, method)


def test_a_window_sends_only_the_keys_within_it():
    results = run_on_ranks(attend_once, 4, "long, window", "ring", N)
    sent = [sum(messages(forward, "send")) for forward, *_ in results]
    assert sent == [6 * B * N * (D + DV)] * 3 + [0]


def order_of_events(rank, ranks):
    """Return the kernels, messages and waits of forward and backward, in their order."""
    events = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in ("send", "recv_"):
                events.append(name)
            elif "flash_attention" in name and events[-1:] != ["attention"]:
                events.append("attention")
            return func(*args, **(kwargs or {}))

        def wait(self, part, function):
            if events[-1] != "wait":  # one for the message that arrives, one for the message that leaves
                events.append("wait")
            return function()

    watch = Watch()
    mask = AttentionMask(causal=True)
    partition = partition_for("ring", mask, 1, 48, ranks, num_heads=2, num_kv_heads=2)
    leaves = [torch.randn(12, 1, 2, 8, requires_grad=True) for _ in range(3)]
    with watch, observed_by(watch):
        context = context_parallel_attention(*leaves, mask, partition=partition, group=dist.group.WORLD)
        events.append("backward")
        context.backward(torch.randn_like(context))
    return events


def test_keys_of_the_next_hop_travel_under_attention():
    message = ["recv_", "send"]
    forward = [*message, "attention", "wait", *message, "attention", "wait", *message, "attention", "wait", "attention"]
    backward = [*message, "attention", "wait"]  # half of the own keys
    backward += [*message, "attention", *message, "wait"]  # hop 1: its gradients leave, the keys of hop 2 arrive
    backward += [*message, "attention", "wait", *message, "wait"]  # hop 2: first the gradients of hop 1 arrive
    backward += ["attention", "wait", *message]  # hop 3
    backward += ["attention", "wait"]  # the other half
    for events in run_on_ranks(order_of_events, 4):
        assert events == [*forward, "backward", *backward]


class LargestTensor(TorchDispatchMode):
    """Records the most elements of a tensor that an op returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return results


def largest_tensor(rank, ranks, method, seq_len, window):
    """Return the most elements of a tensor in a step of rank 5 of a fake group of 8 ranks."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    documents = torch.tensor([0, 1, 5000, 30_000, seq_len])
    mask = AttentionMask(causal=True, window=window, documents=documents)
    partition = partition_for(method, mask, 1, seq_len, 8, num_heads=8, num_kv_heads=2)
    largest = LargestTensor()
    with FakeTensorMode():
        shapes = [(partition.sizes[5], 1, heads, 16) for heads in (8, 2, 2)]
        leaves = [torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        with largest:
            context = context_parallel_attention(
                *leaves, mask, partition=partition, method=method, group=dist.group.WORLD
            )
            context.backward(torch.empty_like(context))
    return largest.elements


@pytest.mark.parametrize(
    ("method", "seq_len", "window"),
    [*((method, 1 << 20, None) for method in METHODS), ("ring", 1 << 16, 4096), ("all_gather", 1 << 16, 4096)],
)
def test_no_tensor_has_the_square_of_the_sequence(method, seq_len, window):
    (elements,) = run_on_ranks(largest_tensor, 1, method, seq_len, window)
    keys_and_values = seq_len * 2 * 2 * 16
    assert elements <= keys_and_values
