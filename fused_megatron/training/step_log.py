"""Figures of finished steps: in the metrics of the run folder, and for the output to the user."""

import dataclasses
from collections import deque
from collections.abc import Mapping
from datetime import datetime, timezone

import torch

from fused_megatron.assembly.step_sums import StepSums
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.config import TrainConfig
from fused_megatron.models.expert_loads import LoadReport
from fused_megatron.observe.model_flops import gpt_step_flops
from fused_megatron.observe.peak_memory import peak_memory_bytes
from fused_megatron.training.progress import Reporter, StepFigures


class StepLog:
    """Log of a run's steps.

    Args:
        config: of the run.
        vocab_size: token ids of the model.
        device: of this rank.
        run: folder for the metrics; None on ranks that do not write them.
        reporter: output for the user.

    Attributes:
        product_flops_per_s: FLOP/s of large matrix products on all ranks; None if they were not measured.
    """

    def __init__(
        self, config: TrainConfig, vocab_size: int, device: torch.device, run: RunFolder | None, reporter: Reporter
    ) -> None:
        self.product_flops_per_s: float | None = None
        self._config, self._model = config, dataclasses.replace(config.model, vocab_size=vocab_size)
        self._device, self._run, self._reporter = device, run, reporter
        self._times: deque[float] = deque(maxlen=20)

    def tokens_per_s(self) -> float:
        """Return the median speed of the latest steps, in tokens per second over all ranks."""
        if not self._times:
            return 0.0
        seconds = sorted(self._times)[len(self._times) // 2]
        return self._config.training.global_batch_size * self._model.seq_len / seconds

    def add(
        self,
        step: int,
        seconds: float,
        sums: StepSums,
        lr: float,
        more: Mapping[str, float],
        loads: LoadReport | None,
    ) -> None:
        """Log a step.

        Args:
            step: its number, from 1 on.
            seconds: its time.
            sums: its sums over all ranks.
            lr: its learning rate.
            more: further entries of the metrics.
            loads: loads of the experts; None in a model without experts.
        """
        self._times.append(seconds)
        speed = self.tokens_per_s()
        # The metrics compare with the held-out loss, which has no auxiliary loss.
        loss = sums.loss if loads is None else sums.loss - loads.balance_loss - loads.z_loss
        mfu = self._mfu(seconds, more.get("visible_pairs"))
        peak = peak_memory_bytes(self._device)
        if self._run is not None:
            self._run.append_metrics(
                {
                    "step": step,
                    "loss": loss,
                    "gradient_norm": sums.gradient_norm,
                    "lr": lr,
                    "tokens_per_s": round(speed, 1),
                    "step_s": seconds,
                    "mfu": mfu,
                    "peak_memory_bytes": peak,
                    "time": now(),
                    **more,
                    **({} if loads is None else loads.metrics()),
                }
            )
        seconds_left = (self._config.training.num_steps - step) * seconds
        text = "" if loads is None else loads.text()
        figures = StepFigures(loss, sums.gradient_norm, seconds, speed, seconds_left, mfu, peak, text)
        self._reporter.step(step, figures)

    def _mfu(self, seconds: float, visible_pairs: float | None) -> float | None:
        """Return model FLOPs / seconds / FLOP/s of large matrix products on all ranks, as in a report of benchmarks."""
        if self.product_flops_per_s is None:
            return None
        num_tokens = self._config.training.global_batch_size * self._model.seq_len
        flops, _ = gpt_step_flops(
            self._model, num_tokens, visible_pairs=None if visible_pairs is None else int(visible_pairs)
        )
        return flops / seconds / self.product_flops_per_s


def now() -> str:
    """Return the time in UTC, as in 2026-11-30T18:05:00.123Z."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
