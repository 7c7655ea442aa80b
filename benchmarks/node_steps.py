"""Timing of the trainer's own step on random tokens, on the ranks of a preset of node.py."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from fused_megatron.assembly.assemble import assemble
from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.benchmarking.timing_devices import TimingDevice
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.collectives.together import gather_json
from fused_megatron.config import TrainConfig
from fused_megatron.data.token_dataset import TokenDataset, ValidationDataset
from fused_megatron.data.training_data import TrainingData
from fused_megatron.observe.step_breakdown import StepBreakdown
from fused_megatron.training.process_group import world_group
from fused_megatron.training.progress import Reporter
from fused_megatron.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measurements of all ranks.

    Attributes:
        seconds: time of every step on its slowest rank.
        parts: seconds of each part of the median step, the mean over the ranks.
        peak_bytes: largest memory of a rank, since before the model was made.
        losses: losses of all steps, including the warm-up.
    """

    seconds: list[float]
    parts: dict[str, float]
    peak_bytes: int | None
    losses: list[float]


class RandomTokens(TokenDataset):
    """Rows of random tokens, a function of only (seed, index)."""

    def __init__(self, seq_len: int, vocab_size: int, seed: int) -> None:
        self.seq_len, self.vocab_size, self._seed = seq_len, vocab_size, seed

    def rows(self, first: int, count: int) -> np.ndarray:
        """Return int64 [count, seq_len + 1]."""
        return np.stack(
            [
                np.random.default_rng((self._seed, first + row)).integers(self.vocab_size, size=self.seq_len + 1)
                for row in range(count)
            ]
        )


def build_trainer(config: TrainConfig, device: torch.device, folder: Path) -> Trainer:
    """Build the trainer of `fused-megatron train` with random tokens as data; metrics go to the folder."""
    plan = plan_pipeline(config)
    mesh = build_mesh(config, device.type)
    model = build_stages(config, mesh, plan, device)
    vocab_size = int(config.model.vocab_size or 0)
    tokens = RandomTokens(config.model.seq_len, vocab_size, config.training.seed)
    data = TrainingData(
        description="random tokens",
        fingerprint="",
        vocab_size=vocab_size,
        tokenizer=None,
        tokenizer_path=None,
        training=tokens,
        validation=cast(ValidationDataset, None),
    )
    run = RunFolder(folder)
    run.create()
    return Trainer(assemble(config, mesh, plan, model), data, run, Reporter(False, 1))


def measure(config: TrainConfig, device: TimingDevice, *, warm_up: int, steps: int) -> Measured:
    """Build, warm up and time `steps` steps, on every rank of the default process group, whose size the config has."""
    with tempfile.TemporaryDirectory() as folder:
        made: list[Trainer] = []

        def begin() -> None:
            made.append(build_trainer(config, device.device, Path(folder)))
            made[0].train_step()

        peak_bytes = device.peak_bytes(begin)
        (trainer,) = made
        for _ in range(warm_up - 1):
            trainer.train_step()
        breakdown = StepBreakdown(device.device)
        seconds, parts = [], []
        for _ in range(steps):
            _meet(device.device)
            with breakdown.record():
                seconds.append(_seconds(trainer.train_step, device.device))
            parts.append(breakdown.parts(seconds[-1]))
        losses = [record["loss"] for record in trainer.run_folder.read_metrics()]  # on rank 0
        own = {"seconds": seconds, "parts": parts, "peak": peak_bytes, "losses": losses}
        trainer.executor.close()
    return _together(gather_json(own, world_group()))


def _meet(device: torch.device) -> None:
    """Wait until all ranks have finished their earlier work."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the seconds to the end of all work of this rank."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _together(ranks: list[dict[str, Any]]) -> Measured:
    names = [name for name in ranks[0]["parts"][0]]
    parts = {
        name: statistics.mean(statistics.median(step.get(name, 0.0) for step in rank["parts"]) for rank in ranks)
        for name in names
    }
    peaks = [rank["peak"] for rank in ranks if rank["peak"] is not None]
    slowest = [max(step) for step in zip(*(rank["seconds"] for rank in ranks), strict=True)]
    return Measured(slowest, parts, max(peaks, default=None), ranks[0]["losses"])
