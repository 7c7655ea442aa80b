"""Predicted steps beside measured steps: layouts of one GPT on gloo ranks of this machine, also over a slow link.

    make bench-predicted                                      # calibrate, then 20 layouts of 2 and of 4 ranks
    make bench-predicted ARGS="--ranks 2 --rounds 9"
    make bench-predicted ARGS="--ranks 2 --rates 200 1000"    # 2 ranks joined by a link of this many Mbit/s (root)
    make bench-predicted ARGS="--cluster cluster.toml"        # with the constants of an earlier run

Every case first calibrates a cluster of its own (`fused-megatron calibrate`), on as many ranks over the same link. Then
it runs real steps of each layout with the trainer's own parts, in rounds that go through all layouts, so that a busy
moment of the machine slows all of them. On as many cores as ranks the time in which another process held a core is left
out. The bars: with 2 ranks a median error of at most 10 %, the worst at most 20 %, and the fastest layout chosen, or
one within 3 % of it; with 4 ranks, which share 2 cores, a rank correlation of at least 0.9.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from faults.two_hosts import TwoHosts, missing
from gpt_layouts import SIZES, Size
from slow_link import join, run_on_link, set_rate

from fused_megatron.config import ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.kept_pages import keep_malloc_pages
from fused_megatron.planning.prediction.calibration import calibrate_ranks
from fused_megatron.planning.prediction.cluster import Cluster, cluster_text, load_cluster
from fused_megatron.planning.prediction.machine_measurements import threads_of_rank, usable_cores
from fused_megatron.planning.prediction.measured_steps import RealSteps, slowest_of_ranks
from fused_megatron.planning.prediction.step_time import predict_step
from fused_megatron.testing import run_on_ranks

HOSTS = TwoHosts("fm-predicted")
MEDIAN, WORST, REGRET, CORRELATION = 0.10, 0.20, 0.03, 0.9


class Case(NamedTuple):
    """A layout: its name, and the fields of ParallelConfig and TrainingConfig and of the model that it sets."""

    name: str
    microbatches: int = 1
    parallel: dict[str, Any] = {}  # noqa: RUF012 - never changed
    model: dict[str, Any] = {}  # noqa: RUF012


def cases_of(ranks: int) -> list[Case]:
    """Return the layouts of a number of ranks."""
    return _two_ranks() if ranks == 2 else _four_ranks()


def _pipeline(ranks: int, name: str, microbatches: int, stages: int | None = None, **more: Any) -> Case:
    parallel = {"pipeline_parallel_size": ranks, "schedule": name, "stages_per_rank": stages, **more}
    axes = f"pp={ranks} {name}" + (f" v={stages}" if stages else "")
    return Case(f"{axes} m={microbatches}", microbatches, parallel)


def _two_ranks() -> list[Case]:
    tp, cp, dp = ({f"{axis}_parallel_size": 2} for axis in ("tensor", "context", "data"))
    return [
        Case("tp=2", 1, tp),
        Case("tp=2 m=4", 4, tp),
        Case("tp=2 sp", 1, tp | {"sequence_parallel": True}),
        Case("tp=2 sp m=4", 4, tp | {"sequence_parallel": True}),
        Case("tp=2 recompute", 1, tp, {"recompute": "full"}),
        _pipeline(2, "1f1b", 2),
        _pipeline(2, "1f1b", 8),
        _pipeline(2, "gpipe", 4),
        _pipeline(2, "interleaved_1f1b", 4, 2),
        _pipeline(2, "zb_h1", 4),
        _pipeline(2, "zb_h1", 8),
        _pipeline(2, "zb_v", 4, 2),
        Case("dp=2 ZeRO-0", 1, dp | {"zero_stage": 0}),
        Case("dp=2 ZeRO-1", 1, dp),
        Case("dp=2 ZeRO-1 m=4", 4, dp),
        Case("dp=2 ZeRO-2 m=2", 2, dp | {"zero_stage": 2}),
        Case("dp=2 ZeRO-3", 1, dp | {"zero_stage": 3}),
        Case("cp=2 ring", 1, cp),
        Case("cp=2 all_gather m=2", 2, cp | {"context_parallel_method": "all_gather"}),
        Case("cp=2 all_to_all", 1, cp | {"context_parallel_method": "all_to_all"}),
    ]


def _four_ranks() -> list[Case]:
    tp, cp, pp, dp = ({f"{axis}_parallel_size": 2} for axis in ("tensor", "context", "pipeline", "data"))
    return [
        Case("tp=4", 1, {"tensor_parallel_size": 4}),
        Case("tp=4 sp m=2", 2, {"tensor_parallel_size": 4, "sequence_parallel": True}),
        Case("tp=2 pp=2 m=2", 2, tp | pp),
        Case("tp=2 pp=2 m=8", 8, tp | pp),
        Case("tp=2 dp=2", 1, tp | dp),
        Case("tp=2 sp dp=2 ZeRO-0", 1, tp | dp | {"zero_stage": 0, "sequence_parallel": True}),
        Case("tp=2 cp=2", 1, tp | cp),
        _pipeline(4, "1f1b", 4),
        _pipeline(4, "1f1b", 8),
        _pipeline(4, "gpipe", 8),
        _pipeline(4, "zb_h1", 8),
        _pipeline(4, "zb_v", 8, 2) if False else _pipeline(2, "zb_v", 4, 2, data_parallel_size=2),
        _pipeline(2, "1f1b", 4, data_parallel_size=2),
        _pipeline(2, "interleaved_1f1b", 4, 2, data_parallel_size=2),
        Case("pp=2 cp=2 m=4", 4, pp | cp),
        Case("dp=4 ZeRO-0", 1, {"data_parallel_size": 4, "zero_stage": 0}),
        Case("dp=4 ZeRO-1 m=2", 2, {"data_parallel_size": 4}),
        Case("dp=4 ZeRO-3", 1, {"data_parallel_size": 4, "zero_stage": 3}),
        Case("cp=4 ring", 1, {"context_parallel_size": 4}),
        Case("dp=2 cp=2", 1, dp | cp),
    ]


def config_of(size: Size, case: Case) -> TrainConfig:
    """Return the config of a layout: each has the same GPT and the same global batch."""
    parallel = ParallelConfig(**{"data_parallel_size": 1, **case.parallel}, timeout_s=600)
    replicas = parallel.data_parallel_size or 1
    training = TrainingConfig(
        global_batch_size=size.num_sequences,
        microbatch_size=max(1, size.num_sequences // replicas // case.microbatches),
    )
    return TrainConfig(dataclasses.replace(size.config, **case.model), parallel, training=training)


def measure_cases(rank: int, world_size: int, size: Size, cases: Sequence[Case], rounds: int) -> dict[str, list[Any]]:
    """Run rounds of steps over all layouts; return for each the (seconds, seconds without a core) of every round."""
    device = torch.device("cpu")
    # Connections of one pipeline at a time: a layout runs all its rounds, which cost it two warm-up steps.
    found: dict[str, list[Any]] = {}
    for case in cases:
        steps = RealSteps(config_of(size, case), device)
        times = steps.times(rounds, warm_up=1)
        found[case.name] = [list(times.seconds), list(times.waits)]
        steps.close()
        if rank == 0:
            print(f"  {case.name}: {1e3 * times.median_s(without_waits=True):.0f} ms", flush=True)
    return found


def on_rank(rank: int, world_size: int, size: Size, cases: Sequence[Case], rounds: int) -> dict[str, list[Any]]:
    keep_malloc_pages()
    torch.set_num_threads(threads_of_rank(world_size))
    return measure_cases(rank, world_size, size, cases, rounds)
