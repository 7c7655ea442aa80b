"""Gain from overlap: a tensor-parallel MLP on two ranks that are joined by a link of a known rate.

    make bench-overlap                        (root, Linux: two network namespaces and a veth pair limited by tc tbf)
    make bench-overlap ARGS="--rates 300 1000 --chunks 4 8"

The link costs wall time and little CPU: gloo's threads and the kernel's copies take 3 to 10% of a core. For every rate
and layout it prints milliseconds (medians) of one forward + backward: only compute (the shard's products, no group),
only communication (the collectives of the path without overlap), no overlap, the two layers with overlap,
parallel_mlp, and parallel_mlp with a fixed number of chunks.

The best that any order of work can reach is the sum over forward and backward of max(compute, communication), since y
is needed before dy is known. A third of the compute is in the forward, but half of the communication of TP. If the two
are equal, the sum is 7/6 of max(compute, communication); if one is at least 4/3 of the other, it is 1.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from slow_link import RANKS, join, median_ms, run_on_link
from torch import nn

from fused_megatron import ops
from fused_megatron.collectives import Group
from fused_megatron.collectives.transfers import start_all_gather, start_all_reduce_, start_reduce_scatter
from fused_megatron.overlap import overlap_costs
from fused_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear, parallel_mlp
from fused_megatron.testing.two_hosts import TwoHosts, missing

SEQUENCE, HIDDEN, FFN = 2048, 1024, 4096
HOSTS = TwoHosts("fm-overlap")


class MLP(nn.Module):
    """The MLP as two layers or as one function."""

    def __init__(self, ffn: int, group: Group, sequence_parallel: bool, overlap: bool | int, fused: bool) -> None:
        super().__init__()
        self.options = {"tp_group": group, "sequence_parallel": sequence_parallel, "overlap": overlap}
        self.up = ColumnParallelLinear(HIDDEN, ffn, skip_bias_add=True, **self.options)
        self.down = RowParallelLinear(ffn, HIDDEN, **self.options)
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused:
            return parallel_mlp(x, self.up.weight, self.up.bias, self.down.weight, self.down.bias, **self.options)
        return self.down(ops.bias_gelu(*self.up(x)))


def step_of(model: nn.Module, rows: int) -> Callable[[], None]:
    x = torch.randn(rows, 1, HIDDEN, requires_grad=True)
    dy = torch.randn(rows, 1, HIDDEN)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x).backward(dy)

    return step


def collectives_of(group: Group, sequence_parallel: bool) -> Callable[[], None]:
    """Return a function that runs only the collectives of the plain path."""
    full, shard = torch.zeros(SEQUENCE, 1, HIDDEN), torch.zeros(SEQUENCE // RANKS, 1, HIDDEN)

    def step() -> None:
        if not sequence_parallel:
            for _ in range(2):  # y forward, dx backward
                start_all_reduce_(full, group).wait()
            return
        for _ in range(3):  # x forward; x and dy backward
            start_all_gather(shard, 0, group).wait()
        for _ in range(2):  # y forward, dx backward
            start_reduce_scatter(full, 0, group).wait()

    return step


def run_rank(rank: int, folder: Path, options: argparse.Namespace) -> None:
    join(rank, folder, real_time=True)
    rows = {False: SEQUENCE, True: SEQUENCE // RANKS}
    for mbit_per_s in options.rates:
        if rank == 0:
            HOSTS.limit(mbit_per_s)
        dist.barrier()
        overlap_costs.cache_clear()
        for sequence_parallel in (False, True) if options.sequence_parallel is None else (options.sequence_parallel,):
            steps = {
                "compute": step_of(MLP(FFN // RANKS, None, False, False, False), SEQUENCE),
                "communication": collectives_of(dist.group.WORLD, sequence_parallel),
            }
            for name, (overlap, fused) in ways(options.chunks).items():
                model = MLP(FFN, dist.group.WORLD, sequence_parallel, overlap, fused)
                steps[name] = step_of(model, rows[sequence_parallel])
            ms = median_ms(steps, options.rounds)
            if rank == 0:
                print_row(mbit_per_s, "TP + SP" if sequence_parallel else "TP", ms)
    dist.destroy_process_group()


def ways(chunks: list[int]) -> dict[str, tuple[bool | int, bool]]:
    """Return, by name, the overlap setting and whether the MLP is one function."""
    fixed: dict[str, tuple[bool | int, bool]] = {f"{c} chunks": (c, True) for c in chunks}
    return {"no overlap": (False, False), "by layer": (True, False), "parallel_mlp": (True, True), **fixed}


def print_row(mbit_per_s: int, layout: str, ms: dict[str, float]) -> None:
    compute_ms, communication_ms, *others_ms = ms.values()
    bound = max(compute_ms, communication_ms)
    cells = [f"{value:.0f} ({value / bound:.2f})" for value in others_ms]
    print("|", " | ".join([str(mbit_per_s), layout, f"{compute_ms:.0f}", f"{communication_ms:.0f}", *cells]), "|")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, nargs="+", default=[200, 300, 450, 700, 1500], help="Mbit/s")
    parser.add_argument("--chunks", type=int, nargs="*", default=[8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sequence-parallel", action=argparse.BooleanOptionalAction, help="run only one of the two layouts"
    )
    parser.add_argument("--limit-s", type=float, default=900.0)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return run_rank(options.rank, options.folder, options)
    reason = missing(("ip", "tc"))
    if reason is not None:
        print(f"bench-overlap skipped: {reason}")
        return None
    columns = ["Mbit/s", "layout", "compute", "communication", *ways(options.chunks)]
    print(f"MLP [{SEQUENCE}, {HIDDEN}] x {FFN}, fp32, {RANKS} ranks of one thread, forward + backward, ms;")
    print("in brackets: how many times max(compute, communication)")
    print("|", " | ".join(columns), "|")
    print("|---" * len(columns) + "|", flush=True)
    run_on_link(HOSTS, "bench-overlap", __file__, options.rates[0], options.limit_s)
    return None


if __name__ == "__main__":
    main()
