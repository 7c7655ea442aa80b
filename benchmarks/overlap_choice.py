"""Overhead of overlap=True where nothing can overlap: the choice of chunks, and two tiny layers on two gloo ranks.

    python benchmarks/overlap_choice.py
    python benchmarks/overlap_choice.py --rounds 400

A column- and a row-parallel layer run forward and backward, with overlap=True and overlap=False in turns: rounds are
interleaved, so that other load on the machine slows both.
"""

import argparse
import statistics
import time

import torch
import torch.distributed as dist

from fused_megatron.overlap import chunk_choice
from fused_megatron.overlap.chunk_choice import _chosen
from fused_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from fused_megatron.testing import run_on_ranks

TOKENS, HIDDEN, CALLS = 64, 64, 1000


def microseconds_a_call(group: dist.ProcessGroup) -> tuple[float, float]:
    """Return (first call of a shape, later call) of the choice for a reduction, in CPU time of this thread."""
    choice, x, weight = chunk_choice(True), torch.ones(4096, 1, HIDDEN), torch.ones(HIDDEN, HIDDEN)
    first = []
    for _ in range(20):
        _chosen.cache_clear()
        begin = time.thread_time()
        choice.for_reduction(x, weight, 0, group)
        first.append(time.thread_time() - begin)
    later = []
    for _ in range(20):
        begin = time.thread_time()
        for _ in range(CALLS):
            choice.for_reduction(x, weight, 0, group)
        later.append((time.thread_time() - begin) / CALLS)
    return 1e6 * statistics.median(first), 1e6 * statistics.median(later)


def pair(rank: int, ranks: int, rounds: int) -> tuple[tuple[float, float], dict[bool, list[list[float]]]]:
    group = dist.group.WORLD
    seconds: dict[bool, list[list[float]]] = {}
    for sequence_parallel in (False, True):
        layers = {}
        for overlap in (True, False):
            options = {"tp_group": group, "sequence_parallel": sequence_parallel, "overlap": overlap}
            up = ColumnParallelLinear(HIDDEN, 4 * HIDDEN, **options)
            layers[overlap] = torch.nn.Sequential(up, RowParallelLinear(4 * HIDDEN, HIDDEN, **options))
        x = torch.randn(TOKENS, 1, HIDDEN, requires_grad=True)
        times = seconds[sequence_parallel] = [[], []]
        for i in range(rounds + 10):
            for overlap in (True, False) if i % 2 else (False, True):
                dist.barrier()
                begin = time.perf_counter()
                layers[overlap](x).sum().backward()
                if i >= 10:
                    times[not overlap].append(time.perf_counter() - begin)
    return microseconds_a_call(group), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    (first_us, later_us), seconds = run_on_ranks(pair, 2, parser.parse_args().rounds, timeout_s=600)[0]
    print(f"choice of chunks: {first_us:.0f} us at the first call of a shape, {later_us:.1f} us after")
    for sequence_parallel, (with_overlap, without) in seconds.items():
        ratio = statistics.median(with_overlap) / statistics.median(without)
        print(
            f"pair of layers, forward + backward, tp=2{' + sp' * sequence_parallel}: overlap=True "
            f"{1e3 * statistics.median(with_overlap):.3f} ms, overlap=False {1e3 * statistics.median(without):.3f} ms, "
            f"ratio {ratio:.3f} (medians of {len(without)} interleaved rounds)"
        )


if __name__ == "__main__":
    main()
