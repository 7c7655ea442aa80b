"""Our pipeline engine against torch.distributed.pipelining: a GPT on two ranks of one thread, gloo, in one run.

    make bench-pipeline-peers
    make bench-pipeline-peers ARGS="--sizes small --schedules 1f1b zb_v --rounds 9"

Forward and backward of 8 microbatches, no optimizer. Each engine runs the same schedule on the same cut of the model:

    torch             torch's engine on modules of torch alone (Linear, LayerNorm, attention, cross-entropy)
    ours, plain       our engine on those very modules: what the engine alone is worth
    ours              our engine on our layers: what a user of either has

In every round each runs once, in an order that moves on. A step's time is that of its slowest rank. Ratio: torch's time
over ours, round by round, median [20-80 %]. For a machine that does other work, too, there are two more: best, that of
the fastest steps, and CPU, that of the time for which the busier rank computed, in which no wait has a part. malloc
keeps its pages for all alike.

Memory: what a rank holds at the peak of a step beyond weights and gradients, as the system counts its resident pages,
each engine in processes of its own; there malloc gives every large block back when it is freed, so that the peak is
that of living tensors.
"""

import argparse
import ctypes
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import pipelining

from fused_megatron.config import GPTConfig
from fused_megatron.models import GPT
from fused_megatron.ops import cross_entropy
from fused_megatron.pipeline import build_schedule
from fused_megatron.pipeline.executor import PipelineExecutor
from fused_megatron.pipeline.schedule import stages_of
from fused_megatron.tensor_parallel import column_parallel_linear
from fused_megatron.testing import run_on_ranks
from fused_megatron.testing.side_by_side import Spread
from fused_megatron.training.gradients import GradientBuckets
from fused_megatron.training.kept_pages import keep_malloc_pages, release_free_pages, uses_glibc

# mallopt's name (malloc.h of glibc): from this size on a block is given back when it is freed.
_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES = -3, 1 << 16
RANKS, MICROBATCHES = 2, 8
Step = Callable[[], None]


@dataclass(frozen=True)
class Size:
    """A GPT and its cuts: the number of blocks of every stage, by the placement. The embedding weighs little, the head
    as much as 2.7 (small) and 5.3 blocks (large)."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    seq: int
    cuts: dict[str, tuple[int, ...]]


SIZES = {
    "tiny": Size(4, 32, 2, 64, 16, {"one": (3, 1), "loop": (1, 1, 2, 0), "v": (1, 2, 1, 0)}),
    "small": Size(4, 256, 4, 8192, 256, {"one": (3, 1), "loop": (1, 1, 2, 0), "v": (1, 2, 1, 0)}),
    "large": Size(8, 512, 8, 32768, 512, {"one": (7, 1), "loop": (3, 1, 4, 0), "v": (1, 4, 3, 0)}),
}
# By our name of the schedule: torch's class, and where the stages stand.
SCHEDULES: dict[str, tuple[str, str]] = {
    "gpipe": ("ScheduleGPipe", "one"),
    "1f1b": ("Schedule1F1B", "one"),
    "interleaved_1f1b": ("ScheduleInterleaved1F1B", "loop"),
    "looped_breadth_first": ("ScheduleLoopedBFS", "loop"),
    "zb_h1": ("ScheduleInterleavedZeroBubble", "one"),
    "interleaved_zero_bubble": ("ScheduleInterleavedZeroBubble", "loop"),
    "zb_v": ("ScheduleZBVZeroBubble", "v"),
    "dual_pipe_v": ("ScheduleDualPipeV", "v"),
}
PLACEMENTS = {"one": (0, 1), "loop": (0, 1, 0, 1), "v": (0, 1, 1, 0)}
TORCH, OURS_PLAIN, OURS = "torch", "ours, plain", "ours"
ENGINES = (TORCH, OURS_PLAIN, OURS)


class PlainBlock(nn.Module):
    """A pre-norm transformer block of torch's modules, [B, S, H]."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, h = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, h // self.heads).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).reshape(b, s, h))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PlainStage(nn.Module):
    """Tokens or [B, S, H] to [B, S, H], at the last stage to logits."""

    def __init__(self, size: Size, blocks: int, first: bool, last: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocab, size.hidden) if first else None
        self.positions = nn.Embedding(size.seq, size.hidden) if first else None
        self.blocks = nn.ModuleList(PlainBlock(size.hidden, size.heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(size.hidden) if last else None
        self.head = nn.Linear(size.hidden, size.vocab, bias=False) if last else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tokens is not None and self.positions is not None:
            x = self.tokens(x) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return x if self.head is None or self.norm is None else self.head(self.norm(x))


class OurStage(nn.Module):
    """Tokens [B, S] or [S, B, H] to [S, B, H], at the last stage to logits."""

    def __init__(self, size: Size, blocks: int, first: bool, last: bool) -> None:
        super().__init__()
        config = GPTConfig(
            num_layers=max(1, blocks), hidden_size=size.hidden, num_heads=size.heads, seq_len=size.seq,
            vocab_size=size.vocab, tied_embeddings=False,
        )  # fmt: skip
        whole = GPT(config)
        self.tokens = whole.token_embedding if first else None
        self.positions = whole.position_embedding if first else None
        self.blocks = nn.ModuleList(list(whole.blocks.values())[:blocks])
        self.norm = whole.final_norm if last else None
        self.head = whole.head if last else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tokens is not None:
            x = self.tokens(x.t()) + self.positions.unsqueeze(1)
        for block in self.blocks:
            x = block(x, rotary=None, dropout=None)
        return x if self.norm is None else column_parallel_linear(self.norm(x), self.head.weight, tp_group=None)


def stages_on(rank: int, size: Size, placement: str, kind: type[nn.Module]) -> dict[int, nn.Module]:
    cut = size.cuts[placement]
    stages = {}
    for stage in stages_of(PLACEMENTS[placement], rank):
        torch.manual_seed(stage)  # alike for every engine
        stages[stage] = kind(size, cut[stage], stage == 0, stage == len(cut) - 1)
    return stages


def batch_of(size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randint(size.vocab, (2, MICROBATCHES, size.seq), generator=generator)
    return drawn[0], drawn[1]


def plain_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="sum")


def our_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.flatten(0, -2), target.t().flatten(), reduction="sum")


def torch_step(schedule: str, size: Size, stages: dict[int, nn.Module]) -> tuple[Step, list[torch.Tensor]]:
    """A step of torch's engine and the list that it leaves the losses of the microbatches in."""
    tokens, target = batch_of(size)
    last = len(PLACEMENTS[SCHEDULES[schedule][1]])
    # Shapes are left to its first step, which is not timed.
    wrapped = [
        pipelining.PipelineStage(stage, index, last, torch.device("cpu"), group=dist.group.WORLD)
        for index, stage in stages.items()
    ]
    kind = getattr(pipelining.schedules, SCHEDULES[schedule][0])
    single = issubclass(kind, pipelining.schedules.PipelineScheduleSingle)
    engine = kind(
        wrapped[0] if single else wrapped, MICROBATCHES,
        loss_fn=lambda output, target: plain_loss(output, target) / tokens.numel(), scale_grads=False,
    )  # fmt: skip
    losses: list[torch.Tensor] = []
    ends = {0: (tokens,)}, {last - 1: target}

    def step() -> None:
        inputs = next((ends[0][i] for i in stages if i in ends[0]), ())
        targets = next((ends[1][i] for i in stages if i in ends[1]), None)
        losses.clear()
        # torch keeps all logits until the end of the step unless it is told not to.
        engine.step(*inputs, target=targets, losses=losses if targets is not None else None, return_outputs=False)

    return step, losses


def our_step(schedule: str, size: Size, stages: dict[int, nn.Module]) -> tuple[Step, list[torch.Tensor]]:
    """A step of our engine and the list that it leaves the loss in."""
    tokens, target = batch_of(size)
    placement = PLACEMENTS[SCHEDULES[schedule][1]]
    built = build_schedule(schedule, RANKS, MICROBATCHES, len(placement) // RANKS)
    last = stages.get(len(placement) - 1)

    loss_fn = None if last is None else our_loss if isinstance(last, OurStage) else plain_loss
    engine = PipelineExecutor(built, stages, pp_group=dist.group.WORLD, loss_fn=loss_fn)
    losses: list[torch.Tensor] = []
    inputs, targets = [(row,) for row in tokens.split(1)], list(target.split(1))

    def step() -> None:
        losses[:] = [engine.step(inputs, targets, loss_divisor=tokens.numel())]

    return step, losses


def prepare(
    engine: str, schedule: str, size: Size, rank: int, keep_gradients: bool = False
) -> tuple[Step, dict[int, nn.Module], list[torch.Tensor]]:
    """A step of an engine, which leaves gradients in the stages and what losses this rank knows in the list."""
    stages = stages_on(rank, size, SCHEDULES[schedule][1], OurStage if engine == OURS else PlainStage)
    make = torch_step if engine == TORCH else our_step
    run, losses = make(schedule, size, stages)
    parameters = [p for stage in stages.values() for p in stage.parameters()]
    # As in training: our layers add their products to the buckets that the optimizer reads.
    buckets = GradientBuckets(parameters, None) if engine == OURS else None

    def step() -> None:
        if buckets is not None:
            buckets.zero_()
        else:
            for p in parameters:
                if keep_gradients and p.grad is not None:
                    p.grad.zero_()
                else:
                    p.grad = None
        run()

    return step, stages, losses


def timed(rank: int, world_size: int, schedule: str, size_name: str, engines: list[str], rounds: int) -> Any:
    """Of every engine and round the seconds, and those of CPU, of the slower rank; what is wrong, if anything."""
    pin(rank)
    keep_malloc_pages()
    prepared = {engine: prepare(engine, schedule, SIZES[size_name], rank) for engine in engines}
    for step, _, _ in prepared.values():
        step()  # torch infers shapes
    fault = difference(prepared)
    seconds: dict[str, list[tuple[float, float]]] = {engine: [] for engine in engines}
    for index in range(rounds + 1):
        turn = index % len(engines)
        for engine in engines[turn:] + engines[:turn]:
            dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            prepared[engine][0]()
            spent = [time.perf_counter() - start, time.process_time() - start_cpu]
            slowest = torch.tensor(spent, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if index:  # the first fills malloc's pages
                seconds[engine].append(tuple(slowest.tolist()))
    return seconds, fault


def difference(prepared: dict[str, Any]) -> str | None:
    """Whether the two engines that have the same modules have the same gradients, to rounding."""
    if not {TORCH, OURS_PLAIN} <= set(prepared):
        return None
    ours, theirs = ([p.grad for m in prepared[e][1].values() for p in m.parameters()] for e in (OURS_PLAIN, TORCH))
    for mine, other in zip(ours, theirs, strict=True):
        if not torch.allclose(mine, other, rtol=1e-3, atol=1e-3 * other.abs().max().item()):
            return f"gradients of shape {tuple(mine.shape)} differ: {(mine - other).abs().max().item():.2g}"
    return None


def peak_bytes(rank: int, world_size: int, schedule: str, size_name: str, engine: str) -> int:
    """Resident memory at the peak of a step beyond what is there between steps: weights, gradients, libraries."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
    step, _, _ = prepare(engine, schedule, SIZES[size_name], rank, keep_gradients=True)
    step()
    gc.collect()
    release_free_pages()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    dist.barrier()
    step()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def pin(rank: int) -> None:
    """One core a rank, as on a machine of its own."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})


def ratios(theirs: list[tuple[float, float]], ours: list[tuple[float, float]]) -> str:
    wall, cpu = (Spread.of([a[i] / b[i] for a, b in zip(theirs, ours, strict=True)]) for i in range(2))
    best = min(theirs)[0] / min(ours)[0]
    return f"{wall.median:.2f}x [{wall.low:.2f}-{wall.high:.2f}], best {best:.2f}x, CPU {cpu.median:.2f}x"


def time_all(options: argparse.Namespace) -> None:
    columns = [
        "model",
        "schedule",
        *(f"{e}, tokens/s" for e in options.engines),
        *(f"{e} / torch" for e in options.engines if e != TORCH),
    ]
    print("|", " | ".join(columns), "|")
    print("|---" * len(columns) + "|", flush=True)
    for size_name in options.sizes:
        size = SIZES[size_name]
        tokens = MICROBATCHES * size.seq
        for schedule in options.schedules:
            arguments = (schedule, size_name, options.engines, options.rounds)
            seconds, fault = run_on_ranks(timed, RANKS, *arguments, timeout_s=options.limit_s)[0]
            cells = [f"{tokens / Spread.of([s for s, _ in seconds[engine]]).median:,.0f}" for engine in options.engines]
            cells += [ratios(seconds[TORCH], seconds[engine]) for engine in options.engines if engine != TORCH]
            print("|", " | ".join([size_name, schedule, *cells]), "|", fault or "", flush=True)


def weigh_all(options: argparse.Namespace) -> None:
    columns = ["model", "schedule", *(f"{engine}, MB by rank" for engine in options.engines)]
    print("|", " | ".join(columns), "|")
    print("|---" * len(columns) + "|", flush=True)
    for size_name in options.sizes:
        for schedule in options.schedules:
            cells = []
            for engine in options.engines:
                peaks = run_on_ranks(peak_bytes, RANKS, schedule, size_name, engine, timeout_s=options.limit_s)
                cells.append(" + ".join(f"{peak / 1e6:.0f}" for peak in peaks))
            print("|", " | ".join([size_name, schedule, *cells]), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["small", "large"])
    parser.add_argument("--schedules", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="torch with any other")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=600.0, help="of one schedule")
    parser.add_argument("--only", choices=["time", "memory"])
    options = parser.parse_args()
    if options.only != "memory" and TORCH not in options.engines:
        parser.error("--engines must name torch, to which the others are compared")
    print(f"{MICROBATCHES} microbatches of one sequence, forward + backward, fp32, {RANKS} ranks of one thread, gloo, "
          f"torch {torch.__version__}")  # fmt: skip
    if options.only != "memory":
        time_all(options)
    if options.only != "time":
        if not uses_glibc():
            print("memory: skipped (read from Linux's /proc, with glibc's malloc)")
            return
        weigh_all(options)


if __name__ == "__main__":
    main()
