"""Training steps of one GPT in every layout: ours beside torch's own parallelism and other libraries, in one run.

    make bench-end-to-end                                      # all of it: about half an hour
    python benchmarks/end_to_end.py --short                    # what make bench runs
    python benchmarks/end_to_end.py --sizes medium --layouts tp=2 "dp=2 m=2" --results FILE

A step is forward, backward and AdamW in float32, without dropout, from the same full weights on the same tokens; the
ranks are gloo processes of this machine. Layouts, and the providers in each:

    tp=2, tp=2 + sp    DTensor's parallelize_module, with and without loss_parallel; megatron-core where installed
    pp=2, 8 microbatches, by schedule
                       torch.distributed.pipelining, with our trainer's cut and with the cuts that suit it best
    dp=2, 2 microbatches
                       DistributedDataParallel (no_sync), FSDP2 (sharded again after use, and gathered once a step)
    dp=2 ZeRO-2, dp=2 ZeRO-3
                       FSDP2 that gathers weights once a step, and FSDP2 that shards them again after use
    one process        Hugging Face's GPT-2; plain torch
    tp=2, one process  the limit of a step without its collectives: the matrix products and attention calls of our step
                       and nothing else, and then the bytes of all its other ops at the speed of a copy ("bound")
    --ranks 4          tp=2 x pp=2 and tp=2 x dp=2

Ours is what `fused-megatron train` runs: stages, gradient buckets, executor, optimizer. The losses of the first steps
are compared with plain torch on one process; a provider that differs gets one line and no figure. In every round each
provider makes one step, in an order that rotates by one; ratios are taken within a round. malloc keeps its pages for
all providers. Afterwards a few more steps measure the breakdown of the time. For every provider, the time in which a
rank's thread has nothing to do is exposed communication or the pipeline's bubble. The bubble is the idle time of the
schedule with the measured times of its actions and messages that take no time.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from gpt_layouts import SIZES, Batch, Build, Layout, Size, TrainingStep, Weights, batch_of, full_weights
from gpt_of_libraries import bars_of, rivals_of, ways_of
from gpt_of_torch import plain_step
from run_of_layouts import Case, parser_of, rounds_of, run_cases, threads_of
from steps_on_ranks import Candidate, WrongResult, fill, measure, run_providers, start_rank

from fused_megatron.benchmarking.side_by_side import OURS, Bars, Comparison
from fused_megatron.observe.model_flops import gpt_step_flops
from fused_megatron.pipeline import simulate
from fused_megatron.pipeline.schedule.schedules import SCHEDULES
from fused_megatron.pipeline.view.simulation import mean_costs

CHECKED_STEPS = 3
# Sums in another order, through two updates of AdamW, which magnifies small differences.
TOLERANCE = 1e-4
PIPELINES = ["1f1b", "interleaved_1f1b", "zb_h1"]


def layouts_of(world_sizes: list[int], schedules: list[str]) -> list[Layout]:
    """Return the layouts to measure."""
    grid = [Layout(tp=2), Layout(tp=2, sequence_parallel=True)]
    grid += [
        Layout(pp=2, microbatches=8, schedule=name, stages_per_rank=2 if "interleaved" in name else None)
        for name in schedules
    ]
    grid += [Layout(dp=2, microbatches=2), Layout(dp=2, zero_stage=2), Layout(dp=2, zero_stage=3), Layout()]
    grid += [Layout(tp=2, pp=2, microbatches=8), Layout(tp=2, dp=2, microbatches=2)]
    return [layout for layout in grid if layout.ranks in world_sizes]


def on_rank(
    rank: int, world_size: int, journal: str, names: list[str], size: Size, layout: Layout, threads: int, rounds: int
) -> None:
    """Build, check and time these providers on every rank."""
    start_rank(threads)
    batch, weights = batch_of(size, layout), full_weights(size)
    right = [0.0] * CHECKED_STEPS
    if rank == 0:
        step = plain_step(size, layout, weights)
        right = [float(step.run(*batch)) for _ in range(CHECKED_STEPS)]
        del step
    dist.broadcast_object_list(right)
    ways = ways_of(size, layout)
    builds = {name: lambda build=ways[name]: checked(build, size, layout, weights, batch, right) for name in names}
    measure(rank, world_size, journal, builds, rounds)


def checked(build: Build, size: Size, layout: Layout, weights: Weights, batch: Batch, right: list[float]) -> Candidate:
    """Build a provider and check its first losses."""
    step = build(size, layout, weights)
    if not step.trains:
        return Candidate(lambda: step.run(*batch))
    losses = [loss_of(step, batch) for _ in range(CHECKED_STEPS)]
    if any(not abs(loss - exact) <= TOLERANCE * abs(exact) for loss, exact in zip(losses, right, strict=True)):
        shown = [" ".join(f"{loss:.6f}" for loss in some) for some in (losses, right)]
        raise WrongResult(f"losses {shown[0]}, not {shown[1]}")
    bubble = (lambda: bubble_s(step)) if layout.pp > 1 else None
    return Candidate(lambda: step.run(*batch), bubble=bubble)


def loss_of(step: TrainingStep, batch: Batch) -> float:
    """Return the mean of the loss over the ranks that know a part of it."""
    known = step.run(*batch)
    both = torch.tensor([0.0, 0.0] if known is None else [float(known), 1.0], dtype=torch.float64)
    dist.all_reduce(both)
    return float(both[0] / both[1]) if both[1] else math.nan


def bubble_s(step: TrainingStep) -> float:
    """Return the mean idle seconds of a rank in the last step if messages took no time."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, step.actions)
    schedule = step.schedule
    assert schedule is not None
    costs = mean_costs((action for actions in every for action in actions), schedule.num_stages)
    timeline = simulate(schedule, costs)
    return timeline.makespan - sum(timeline.busy) / schedule.num_ranks


def compared(name: str, size: Size, layout: Layout, rounds: int, limit_s: float) -> tuple[list[Comparison], bool]:
    """Return a comparison with each rival, and False after Ctrl-C."""
    print(f"\nGPT {name} ({size}), {layout}", flush=True)
    rivals, ways = rivals_of(size, layout), list(ways_of(size, layout))
    threads = threads_of(layout.ranks)
    measured, go_on = run_providers(on_rank, layout.ranks, ways, size, layout, threads, rounds, limit_s=limit_s)
    tokens = layout.num_sequences(size) * size.seq_len
    model_flops, hardware_flops = gpt_step_flops(size.config, tokens)
    found = []
    for rival_name, rival in rivals.items():
        label = f"{layout}, against {rival_name}" if rival_name else str(layout)
        comparison = Comparison(
            f"GPT {name}",
            label,
            "float32",
            None,
            bars_of(rival) if measured.seconds else Bars(),
            ranks=layout.ranks,
            tokens=tokens,
            model_flops=model_flops,
            hardware_flops=hardware_flops,
        )
        fill(comparison, measured, {name: name for name in (OURS, *rival.ways)})
        if not rival_name or set(comparison.seconds) - {OURS}:
            found.append(comparison)
        else:  # no rival is installed: its line joins the others
            found[0].faults |= {k: v for k, v in comparison.faults.items() if k != OURS}
    return [c for c in found if c.seconds or c.faults], go_on


def cases_of(options: Any) -> Iterator[tuple[str, Layout]]:
    sizes = ["tiny"] if options.quick else options.sizes or (["small"] if options.short else ["small", "medium"])
    for name in sizes:
        for layout in layouts_of(options.ranks, options.schedules or PIPELINES[:: 2 if options.short else 1]):
            if options.layouts is None or str(layout) in options.layouts:
                yield name, layout


def main() -> None:
    parser = parser_of(__doc__)
    layouts = [str(layout) for layout in layouts_of([1, 2, 4], PIPELINES)]
    parser.add_argument("--sizes", nargs="+", choices=[name for name in SIZES if name != "tiny"])
    parser.add_argument("--ranks", type=int, nargs="+", choices=[1, 2, 4], default=[2, 1])
    parser.add_argument("--layouts", nargs="+", metavar="LAYOUT", help=f"some of: {', '.join(layouts)}")
    parser.add_argument(
        "--schedules", nargs="+", choices=[n for n, kind in SCHEDULES.items() if kind.weights == "synchronous"]
    )
    options = parser.parse_args()
    cases = list(cases_of(options))
    if not cases:
        parser.error(f"--layouts must be some of: {', '.join(layouts)}")
    whole = options.layouts is None and options.schedules is None and options.sizes is None and options.ranks == [2, 1]
    rounds = rounds_of(options)

    def case(name: str, layout: Layout) -> Case:
        return lambda: compared(name, SIZES[name], layout, rounds, options.limit_s)

    run_cases("end_to_end", options, [case(*one) for one in cases], [layout.ranks for _, layout in cases], whole=whole)


if __name__ == "__main__":
    main()
