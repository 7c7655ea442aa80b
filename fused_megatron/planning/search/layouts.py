"""Layouts of a number of GPUs: all of them, and for each that cannot run a class of reasons."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

from fused_megatron.checks import InputError, check
from fused_megatron.config import ParallelConfig, TrainConfig, TransformerConfig
from fused_megatron.models.stage_cut import check_cut
from fused_megatron.planning.prediction.cluster import Cluster

LEAST_POSITIONS = 1024
"""Positions of a rank below which context parallelism is not searched: its messages would be longer than its work."""


class Layout(NamedTuple):
    """Sizes of the axes; data-parallel ranks of a stage share the experts."""

    tp: int
    pp: int
    cp: int
    dp: int
    ep: int
    etp: int

    @property
    def num_gpus(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def __str__(self) -> str:
        sizes = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "dp": self.dp, "ep": self.ep, "etp": self.etp}
        return " ".join(f"{name}={size}" for name, size in sizes.items() if size > 1 or name in ("tp", "pp", "dp"))


class Settings(NamedTuple):
    """Settings of a run beside the sizes of its layout: keys of a config with the same names."""

    microbatch_size: int
    sequence_parallel: bool
    schedule: str
    stages_per_rank: int
    recompute: str = "none"
    recompute_blocks: int | None = None
    zero_stage: int = 0


class Refusals:
    """Reasons against layouts, grouped by class: the same reason with other numbers is the same class."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._values: defaultdict[str, dict[str, None]] = defaultdict(dict)

    def add(self, reason: str) -> None:
        """Count a layout that falls for this reason. A layout size in it, such as tp=16, is a value of the class."""
        reason = re.sub(r" \(nearest: [^)]*\)", "", reason)
        found = re.search(r"\b(tensor_parallel_size|tp|pp|cp|dp|ep|etp)=([0-9]+)", reason)
        label = reason if found is None else f"{reason[: found.start(2)]}{{}}{reason[found.end(2) :]}"
        self._counts[label] += 1
        if found is not None:
            self._values[label][found[2]] = None

    @property
    def total(self) -> int:
        """Number of layouts that fell."""
        return sum(self._counts.values())

    def lines(self) -> list[str]:
        """Return a line for each class, the largest first."""
        found = []
        for label, count in sorted(self._counts.items(), key=lambda item: (-item[1], item[0])):
            values = sorted(self._values[label], key=int)
            shown = values if len(values) <= _MOST_VALUES else [*values[: _MOST_VALUES - 1], "..", values[-1]]
            found.append(f"{label.replace('{}', ', '.join(shown))}: {count:,} layout{'s' if count > 1 else ''}")
        return found


_MOST_VALUES = 6


@lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    """Return all divisors, ascending."""
    small = [each for each in range(1, isqrt(number) + 1) if number % each == 0]
    return tuple(dict.fromkeys([*small, *(number // each for each in reversed(small))]))


def check_gpus(num_gpus: int, cluster: Cluster) -> None:
    """Raise InputError unless whole nodes, or a part of one node, have this number of GPUs."""
    check(num_gpus >= 1, f"gpus={num_gpus} must be 1 or more")
    node = cluster.gpus_per_node
    below = num_gpus // node * node
    check(
        num_gpus <= node or num_gpus % node == 0,
        f"gpus={num_gpus} must be at most gpus_per_node={node} of {cluster.name}, or a multiple of it (nearest: "
        f"{below}, {below + node})",
    )


def valid_layouts(base: TrainConfig, num_gpus: int, cluster: Cluster, refusals: Refusals) -> list[Layout]:
    """Return the layouts that the model and the batch allow; count all others in refusals.

    Left out, with a reason: tensor parallelism beyond a node, and context parallelism with fewer than LEAST_POSITIONS
    positions a rank.
    """
    found = []
    for layout in _layouts(base.model, num_gpus):
        try:
            _check(base, layout, cluster)
        except InputError as error:
            refusals.add(str(error))
        else:
            found.append(layout)
    return found


def _layouts(model: TransformerConfig, num_gpus: int) -> Iterator[Layout]:
    """Yield all products of sizes; experts divide over ranks of a stage."""
    for tp in divisors(num_gpus):
        for cp in divisors(num_gpus // tp):
            for pp in divisors(num_gpus // tp // cp):
                dp = num_gpus // tp // cp // pp
                for ep, etp in _expert_sizes(model, dp * cp * tp):
                    yield Layout(tp, pp, cp, dp, ep, etp)


def _expert_sizes(model: TransformerConfig, stage_ranks: int) -> Iterator[tuple[int, int]]:
    """Yield the divisions of experts over the ranks of a stage; for a number that does not divide them, only one."""
    if model.num_experts is None:
        yield 1, 1
        return
    for ep in divisors(stage_ranks):
        for etp in divisors(stage_ranks // ep) if model.num_experts % ep == 0 else (1,):
            yield ep, etp


def _check(base: TrainConfig, layout: Layout, cluster: Cluster) -> None:
    tp, pp, cp, dp, ep, etp = layout
    model, node = base.model, cluster.gpus_per_node
    check(tp <= node, f"tp={tp} spans nodes of {node} GPUs")
    check(etp <= node, f"etp={etp} spans nodes of {node} GPUs")
    check(
        cp == 1 or model.seq_len >= cp * LEAST_POSITIONS,
        f"cp={cp} leaves a rank fewer than {LEAST_POSITIONS:,} of {model.seq_len:,} positions",
    )
    if model.num_layers < max(1, pp - 1):
        raise InputError(f"pp={pp} needs more than {model.num_layers} blocks")
    check_cut(model.num_layers, pp)
    batch = base.training.global_batch_size
    check(batch % dp == 0, f"dp={dp} does not divide a batch of {batch:,} sequences")
    if model.num_experts is not None:
        check(model.num_experts % ep == 0, f"ep={ep} does not divide {model.num_experts} experts")
        check(model.expert_ffn_size % etp == 0, f"etp={etp} does not divide experts of width {model.expert_ffn_size}")
    check(model.num_heads % tp == 0, f"tp={tp} does not divide {model.num_heads:,} heads")
    if len(model.expert_blocks) < model.num_layers:
        check(model.ffn_size % tp == 0, f"tp={tp} does not divide {model.ffn_size:,} features of the MLP")
    check(
        model.kv_heads % tp == 0 or tp % model.kv_heads == 0,
        f"tp={tp} does not divide {model.kv_heads} key-value heads",
    )
    train_config(base, layout, Settings(1, False, "1f1b", 1))  # all other checks


def train_config(base: TrainConfig, layout: Layout, settings: Settings) -> TrainConfig:
    """Return the config of a layout.

    Raises:
        InputError: as TrainConfig, and TrainConfig.check_data_parallel.
    """
    model, own = _recomputing(base.model, settings.recompute, settings.recompute_blocks), base.parallel
    parallel = ParallelConfig(
        tensor_parallel_size=layout.tp,
        pipeline_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        data_parallel_size=layout.dp,
        expert_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        schedule=settings.schedule if layout.pp > 1 else None,
        stages_per_rank=settings.stages_per_rank if layout.pp > 1 else None,
        sequence_parallel=settings.sequence_parallel,
        zero_stage=settings.zero_stage,
        context_parallel_method=own.context_parallel_method,
        overlap=own.overlap,
        scatter_messages=own.scatter_messages,
        timeout_s=own.timeout_s,
    )
    training = replace(base.training, microbatch_size=settings.microbatch_size)
    config = replace(base, model=model, parallel=parallel, training=training)
    config.check_data_parallel(layout.dp)
    return config


@lru_cache(maxsize=64)
def _recomputing(model: TransformerConfig, recompute: str, blocks: int | None) -> TransformerConfig:
    return replace(model, recompute=recompute, recompute_blocks=blocks)


def sequence_choices(base: TrainConfig, layout: Layout) -> tuple[bool, ...]:
    """Return the choices of sequence parallelism: off and, if the sequence can be divided, on."""
    rows = base.model.seq_len
    return (False, True) if layout.tp > 1 and rows % layout.tp == 0 and rows >= layout.tp * layout.cp else (False,)
