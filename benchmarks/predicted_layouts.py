"""Layouts whose predicted steps are compared with measured ones: the same GPT and global batch in each."""

import dataclasses
from typing import Any, NamedTuple

from gpt_layouts import Size

from fused_megatron.config import ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.prediction.calibrate import Plan


class Case(NamedTuple):
    """A layout: its name, its microbatches, and the fields that it sets in the sections parallel and model."""

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
    axes += "".join(f" dp={size}" for key, size in more.items() if key == "data_parallel_size")
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
        Case("tp=4 sp m=4", 4, {"tensor_parallel_size": 4, "sequence_parallel": True}),
        Case("tp=2 pp=2 m=2", 2, tp | pp),
        Case("tp=2 pp=2 m=8", 8, tp | pp),
        Case("tp=2 dp=2 recompute", 1, tp | dp, {"recompute": "full"}),
        Case("tp=2 sp dp=2 ZeRO-0", 1, tp | dp | {"zero_stage": 0, "sequence_parallel": True}),
        Case("tp=2 cp=2", 1, tp | cp),
        _pipeline(4, "1f1b", 2),
        _pipeline(4, "1f1b", 8),
        _pipeline(4, "gpipe", 8),
        _pipeline(4, "zb_h1", 8),
        _pipeline(2, "zb_v", 4, 2, data_parallel_size=2),
        _pipeline(2, "1f1b", 4, data_parallel_size=2),
        _pipeline(2, "interleaved_1f1b", 4, 2, data_parallel_size=2),
        Case("pp=2 cp=2 m=4", 4, pp | cp),
        Case("dp=4 ZeRO-0", 1, {"data_parallel_size": 4, "zero_stage": 0}),
        Case("dp=4 ZeRO-1 m=2", 2, {"data_parallel_size": 4}),
        Case("dp=4 ZeRO-3 m=2 recompute", 2, {"data_parallel_size": 4, "zero_stage": 3}, {"recompute": "full"}),
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


@dataclasses.dataclass(frozen=True)
class Job:
    """Work of the ranks: calibrate (unless there is no plan), then run the steps of each layout."""

    size: Size
    cases: tuple[Case, ...]
    rounds: int
    plan: Plan | None
