"""Overlap of a context-parallel ring: attention on two ranks that are joined by a link of a known rate.

    make bench-ring                           (root, Linux: two network namespaces and a veth pair limited by tc tbf)
    make bench-ring ARGS="--rates 300 1000 --tokens 4096"

Causal attention over one document, float32, on two ranks of one thread. For every rate it prints milliseconds (medians)
of forward and of backward: the attention of a rank (A), the transfer of its messages (X), the ring, and the ring over
the best that a ring of two hops can reach: A / 2 + max(A / 2, X). The messages of the backward are keys, values and
their gradients. A and X are measured with the ring's own attention and messages, each without the other.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from slow_link import RANKS, join, median_ms, run_on_link

from fused_megatron.benchmarking.report.measured_tables import MeasuredTables
from fused_megatron.collectives.exchanges import start_message
from fused_megatron.context_parallel import context_parallel_attention, partition_for
from fused_megatron.context_parallel.attention_plan import AttentionPlan, plan_of
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.ops.attention_tiles import AttentionGradients, AttentionSum
from fused_megatron.testing.two_hosts import TwoHosts, missing

HOSTS = TwoHosts("fm-ring")
HEADS, KV_HEADS, HEAD_DIM = 8, 8, 64
MASK = AttentionMask(causal=True)
DOCS = Path(__file__).resolve().parents[1] / "docs"
COLUMNS = ["Mbit/s", "tokens", *("A", "X", "ring", "ring over best"), *("A", "X", "ring", "ring over best")]


def forward_of(plan: AttentionPlan, query: torch.Tensor, keys: list[list[torch.Tensor]]) -> AttentionSum:
    """Attend over keys that are there already."""
    attention = AttentionSum(query)
    for (key, value), hop in zip(keys, plan.hops, strict=True):
        attention.add(key, value, hop.tiles)
    return attention


def backward_of(plan: AttentionPlan, gradients: AttentionGradients, keys: list[list[torch.Tensor]]) -> None:
    """Compute all gradients of keys that are there already, in the parts of the ring's backward."""
    for half in plan.own_halves:
        gradients.add(*keys[0], half)
    for (key, value), hop in zip(keys[1:], plan.hops[1:], strict=True):
        gradients.add(key, value, hop.tiles)
    gradients.grad_query()


def messages_of(plan: AttentionPlan, backward: bool) -> Callable[[], None]:
    """Return a function that only exchanges the ring's messages, one after the other."""
    width = 2 * KV_HEADS * HEAD_DIM
    pairs = []
    for hop in plan.hops[1:]:
        sent, received = (torch.zeros(sum(b - a for a, b in rows) * width) for rows in (hop.sent, hop.received))
        pairs.append(((hop.target, sent), (hop.source, received)))
        if backward:
            pairs.append(((hop.source, received), (hop.target, sent)))

    def step() -> None:
        for outgoing, incoming in pairs:
            start_message((outgoing[0], outgoing[1].clone()), incoming, dist.group.WORLD).wait()

    return step


def steps_of(rank: int, tokens: int) -> dict[str, Callable[[], None]]:
    """Return what is timed, by name."""
    partition = partition_for("ring", MASK, 1, tokens, RANKS, num_heads=HEADS, num_kv_heads=KV_HEADS)
    plan = plan_of(partition, MASK, 1, rank, 1, gathered=False)
    rows = partition.sizes[rank]
    leaves = [torch.randn(rows, 1, heads, HEAD_DIM, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    grad = torch.randn(rows, 1, HEADS, HEAD_DIM)
    query, *own = (x.detach() for x in leaves)
    received = [
        [torch.randn(sum(b - a for a, b in hop.received), 1, KV_HEADS, HEAD_DIM) for _ in own] for hop in plan.hops[1:]
    ]
    keys = [own, *received]
    context, log_sum_exp = forward_of(plan, query, keys).result()
    held: list[torch.Tensor] = []

    def ring_forward() -> None:
        held[:] = [context_parallel_attention(*leaves, MASK, partition=partition, group=dist.group.WORLD)]

    return {
        "A": lambda: forward_of(plan, query, keys).result() and None,
        "X": messages_of(plan, backward=False),
        "ring": ring_forward,
        "A back": lambda: backward_of(plan, AttentionGradients(grad, query, context, log_sum_exp), keys),
        "X back": messages_of(plan, backward=True),
        "ring back": lambda: torch.autograd.grad(held[0], leaves, grad, retain_graph=True) and None,
    }


def run_rank(rank: int, folder: Path, options: argparse.Namespace) -> None:
    join(rank, folder, real_time=False)
    rows = [f"| {' | '.join(COLUMNS)} |"]
    for mbit_per_s in options.rates:
        if rank == 0:
            HOSTS.limit(mbit_per_s)
        dist.barrier()
        for tokens in options.tokens:
            ms = median_ms(steps_of(rank, tokens), options.rounds)
            if rank == 0:
                cells = [f"{mbit_per_s}", f"{tokens:,}"]
                for way in ("", " back"):
                    attention, transfer, ring = (ms[name + way] for name in ("A", "X", "ring"))
                    best = attention / 2 + max(attention / 2, transfer)
                    cells += [f"{attention:.0f}", f"{transfer:.0f}", f"{ring:.0f}", f"{ring / best:.2f}"]
                rows.append(f"| {' | '.join(cells)} |")
                print(rows[-1], flush=True)
    dist.destroy_process_group()
    if rank == 0 and options.write:
        command = 'make bench-ring ARGS="--tokens 2048 4096 8192 --write"'
        tables = MeasuredTables(DOCS / "results" / "ring.json", DOCS / "long_context.md", command)
        tables.add("ring", rows, printed=True)
        tables.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, nargs="+", default=[200, 500, 1500], help="Mbit/s")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=900.0)
    parser.add_argument(
        "--write", action="store_true", help="keep the tables in docs/results, and show them in docs/long_context.md"
    )
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return run_rank(options.rank, options.folder, options)
    reason = missing(("ip", "tc"))
    if reason is not None:
        print(f"bench-ring skipped: {reason}")
        return None
    print("causal attention, 8 heads of 64, fp32, 2 ranks of one thread, ms: forward, then backward")
    print("|", " | ".join(COLUMNS), "|")
    print("|---" * len(COLUMNS) + "|", flush=True)
    run_on_link(HOSTS, "bench-ring", __file__, options.rates[0], options.limit_s)
    return None


if __name__ == "__main__":
    main()
