"""The methods of context-parallel attention side by side, and how even the work of the ranks is.

    make bench-context-parallel
    python benchmarks/context_parallel.py --lengths 2048 8192 --rounds 9

Times: forward and backward on two gloo ranks of one thread each, causal attention over packed documents, float32. In
every round each method runs once, in an order that rotates by one; the times are medians, the ratios medians of the
ratios within a round. A step ends with the slower rank. Beside the methods stands half of the time of one rank with the
whole sequence: the bound of two ranks.

Work: the shares of 2, 4 and 8 ranks run one after the other in one process without communication. Printed is the
processor time of the slowest share over the mean (the least of the rounds), and the same of the visible pairs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fused_megatron.benchmarking.report.measured_tables import MeasuredTables
from fused_megatron.context_parallel import METHODS, context_parallel_attention, partition_for
from fused_megatron.context_parallel.attention_plan import plan_of
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.ops.attention_tiles import AttentionGradients, AttentionSum
from fused_megatron.sharding import SequencePartition
from fused_megatron.testing import run_cases_on_ranks

BATCH, HEADS, KV_HEADS, HEAD_DIM = 1, 8, 4, 64
ONE_RANK = "one rank / 2"
DOCS = Path(__file__).resolve().parents[1] / "docs"


def packed(seq_len: int, longest: int, window: int | None = None) -> AttentionMask:
    """Return the mask of documents of 1 to `longest` tokens, the same in every process."""
    rng, ends = np.random.default_rng(seq_len), [0]
    while ends[-1] < seq_len:
        ends.append(min(seq_len, ends[-1] + int(rng.integers(1, longest + 1))))
    return AttentionMask(True, window, None, torch.tensor(ends))


def masks(seq_len: int) -> dict[str, AttentionMask]:
    """Return masks by name."""
    return {
        "one document": AttentionMask(causal=True),
        f"window {seq_len // 8}": AttentionMask(causal=True, window=seq_len // 8),
        "documents": packed(seq_len, min(4000, seq_len // 2)),
        "documents, window": packed(seq_len, seq_len, window=seq_len // 8),
    }


def tensors(rows: int) -> list[torch.Tensor]:
    """Return query, key, value with gradients, and the gradient of the context."""
    shapes = [(rows, BATCH, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes] + [torch.randn(shapes[0])]


def step_of(partition: SequencePartition, mask: AttentionMask, method: str, rank: int) -> Callable[[], None]:
    *leaves, grad = tensors(partition.sizes[rank])
    group = dist.group.WORLD if partition.num_ranks > 1 else None

    def step() -> None:
        context = context_parallel_attention(*leaves, mask, partition=partition, method=method, group=group)
        torch.autograd.grad(context, leaves, grad)

    return step


def seconds_of_rounds(rank: int, ranks: int, seq_len: int, name: str, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every round of each method on this rank."""
    mask = masks(seq_len)[name]
    heads = {"num_heads": HEADS, "num_kv_heads": KV_HEADS}
    steps = {}
    for method in METHODS:
        partition = partition_for(method, mask, BATCH, seq_len, ranks, **heads)
        steps[method] = step_of(partition, mask, method, rank)
    steps[ONE_RANK] = step_of(SequencePartition.contiguous(seq_len, 1), mask, "ring", 0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for index in range(rounds + 1):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            dist.barrier()
            start = time.perf_counter()
            if name != ONE_RANK or rank == 0:
                steps[name]()
            dist.barrier()
            taken = time.perf_counter() - start
            if index > 0:  # the first warms up
                seconds[name].append(taken / 2 if name == ONE_RANK else taken)
    return seconds


def times(lengths: list[int], rounds: int) -> Iterator[str]:
    """Yield the rows of the table of times."""
    cases = [(seq_len, name, rounds) for seq_len in lengths for name in masks(seq_len)]
    names = [*METHODS, ONE_RANK]
    yield (
        "| tokens | mask | "
        + " | ".join(f"{name}, ms" for name in names)
        + " | x one rank / 2: ring |"
        + " |".join(f" {name}" for name in METHODS[1:])
        + " |"
    )
    yield "|---" * (2 + len(names) + len(METHODS)) + "|"
    for case in cases:
        ((seconds, _),) = run_cases_on_ranks(seconds_of_rounds, 2, [case], timeout_s=600)
        cells = [f"{1e3 * statistics.median(seconds[name]):.0f}" for name in names]
        bound = seconds[ONE_RANK]
        for method in METHODS:
            ratios = sorted(ours / least for ours, least in zip(seconds[method], bound, strict=True))
            low, high = ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
            cells.append(f"{statistics.median(ratios):.2f} [{low:.2f}-{high:.2f}]")
        yield f"| {case[0]:,} | {case[1]} | " + " | ".join(cells) + " |"


def processor_seconds(partition: SequencePartition, mask: AttentionMask, rank: int) -> float:
    """Return the processor time of a rank's share of a ring, forward and backward, on random keys."""
    plan = plan_of(partition, mask, BATCH, rank, 1, gathered=False)
    query, *_, grad = (x.detach() for x in tensors(partition.sizes[rank]))
    keys = [[x.detach() for x in tensors(sum(b - a for a, b in hop.received))[1:3]] for hop in plan.hops]
    start = time.process_time()
    attention = AttentionSum(query)
    for (key, value), hop in zip(keys, plan.hops, strict=True):
        attention.add(key, value, hop.tiles)
    gradients = AttentionGradients(grad, query, *attention.result())
    for (key, value), hop in zip(keys, plan.hops, strict=True):
        gradients.add(key, value, hop.tiles)
    gradients.grad_query()
    return time.process_time() - start


def work(seq_len: int, rounds: int) -> Iterator[str]:
    """Yield the rows of the table of work."""
    yield "| tokens | mask | ranks | slowest / mean, processor time | most / mean, visible pairs |"
    yield "|---|---|---|---|---|"
    for name, mask in masks(seq_len).items():
        for ranks in (2, 4, 8):
            heads = {"num_heads": HEADS, "num_kv_heads": KV_HEADS}
            partition = partition_for("ring", mask, BATCH, seq_len, ranks, **heads)
            # The least of the rounds: other load on the machine only adds processor time.
            seconds = [[processor_seconds(partition, mask, rank) for rank in range(ranks)] for _ in range(rounds)]
            shares = [min(of_rank) for of_rank in zip(*seconds, strict=True)]
            loads = partition.work(mask.visibility(BATCH, seq_len).pairs_of_positions())
            uneven = [max(each) * ranks / sum(each) for each in (shares, loads)]
            yield f"| {seq_len:,} | {name} | {ranks} | {uneven[0]:.3f} | {uneven[1]:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work-length", type=int, default=8192, help="tokens of the table of work; 0: no such table")
    parser.add_argument(
        "--write", action="store_true", help="keep the tables in docs/results, and show them in docs/long_context.md"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = DOCS / "results" / "context_parallel.json"
    tables = MeasuredTables(file, DOCS / "long_context.md", "make bench-context-parallel ARGS=--write")
    if options.lengths:
        tables.add("methods", times(options.lengths, options.rounds))
        print()
    if options.work_length:
        tables.add("work of the shares", work(options.work_length, options.rounds))
    if options.write:
        tables.write()


if __name__ == "__main__":
    main()
