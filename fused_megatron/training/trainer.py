"""The training loop."""

import dataclasses
import math
import os
import signal
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fused_megatron.assembly.assemble import Assembly
from fused_megatron.checkpoint import save_checkpoint
from fused_megatron.checkpoint.model_state import optimizer_boxes, parameter_boxes
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import SharedError
from fused_megatron.collectives.together import gather_json, sum_over_ranks_
from fused_megatron.data.training_data import TrainingData
from fused_megatron.data_parallel.gradient_division import gradient_divisor
from fused_megatron.models import BatchPosition
from fused_megatron.sharding import mark_all_shards
from fused_megatron.sharding.gradient_norm import clip_coefficient, global_gradient_norm, non_finite_parameters
from fused_megatron.training.evaluation import evaluate
from fused_megatron.training.launch import world_group
from fused_megatron.training.learning_rate import learning_rate
from fused_megatron.training.progress import Reporter


class NonFiniteError(SharedError, RuntimeError):
    """The loss or a gradient became NaN or infinite; the weights are those before the step."""


@dataclass
class Progress:
    """Where a run stands; what a resumed run needs besides tensors."""

    step: int = 0
    samples_consumed: int = 0


class Trainer:
    """A model, its optimizer and its place in the data; run() trains to the last step.

    Args:
        assembly: settings, ranks, this rank's stages, executor and optimizer.
        data: training and held-out tokens.
        run: where metrics and checkpoints go (rank 0 writes all but the checkpoints' shards).
        reporter: what the user sees.
    """

    def __init__(
        self,
        assembly: Assembly,
        data: TrainingData,
        run: RunFolder,
        reporter: Reporter,
    ) -> None:
        self.config = assembly.config
        self.mesh = assembly.mesh
        self.plan = assembly.plan
        self.model = assembly.model
        self.parameters = assembly.parameters
        self.gradients = assembly.gradients
        self.executor = assembly.executor
        self.optimizer = assembly.optimizer
        self.device = assembly.device
        self.data = data
        self.run_folder = run
        self.reporter = reporter
        self._accumulate_gradients = assembly.accumulate_gradients
        self.progress = Progress()
        self._stop_requested = False
        self._step_times: deque[float] = deque(maxlen=20)

    def run(self) -> bool:
        """Train up to config.training.num_steps; False when SIGTERM ended the run early (after a checkpoint).

        After an error the first SIGTERM stays without effect: launchers send one to the ranks that are left when a
        rank is lost, and these must live to say what they saw.
        """
        training = self.config.training
        previous = signal.signal(signal.SIGTERM, self._request_stop)
        finished = True
        with self.reporter.steps(self.progress.step, training.num_steps):
            while finished and self.progress.step < training.num_steps:
                stop = self.train_step()
                step, last = self.progress.step, self.progress.step == training.num_steps
                if step % training.eval_interval == 0 or last:
                    self._evaluate()
                if step % training.checkpoint_interval == 0 or last or stop:
                    self.save()
                finished = last or not stop
        signal.signal(signal.SIGTERM, previous)
        return finished

    def tensor_boxes(self) -> dict[str, Any]:
        """Every tensor of a checkpoint by name, as a box of its full tensor."""
        mark_all_shards(self.model)
        return {**parameter_boxes(self.parameters), **optimizer_boxes(self.parameters, self.optimizer.state())}

    def rank_tensors(self) -> dict[str, torch.Tensor]:
        """What each rank keeps for itself: the states of torch's random number generators."""
        states = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def set_rank_tensors(self, states: Mapping[str, torch.Tensor]) -> None:
        """Go on from what rank_tensors() gave."""
        if "rng.cpu" in states:
            torch.set_rng_state(states["rng.cpu"])
        if "rng.cuda" in states:
            torch.cuda.set_rng_state(states["rng.cuda"], self.device)

    def layout(self) -> dict[str, int]:
        """Length of each axis of the mesh."""
        return {"pp": self.mesh.pp_size, "dp": self.mesh.dp_size, "tp": self.mesh.tp_size}

    def save(self) -> None:
        """Write a checkpoint of the present step; collective."""
        save_checkpoint(
            self.run_folder.checkpoints,
            self.progress.step,
            self.tensor_boxes(),
            state=self._checkpoint_state(),
            rank_tensors=self.rank_tensors(),
            group=world_group(),
            keep=self.config.training.keep_checkpoints,
        )

    def tokens_per_s(self) -> float:
        """Median speed of the latest steps, over all ranks."""
        if not self._step_times:
            return 0.0
        seconds = sorted(self._step_times)[len(self._step_times) // 2]
        return self.config.training.global_batch_size * self.config.model.seq_len / seconds

    def train_step(self) -> bool:
        """One optimizer step; True when a rank was asked to stop."""
        started = time.perf_counter()
        training, step = self.config.training, self.progress.step
        self.gradients.zero_()
        loss, stop = self._sum_over_ranks(self._forward_and_backward())
        groups = self.mesh.tp_group, self.mesh.pp_group
        norm = float(global_gradient_norm(self.parameters, self.gradients, *groups))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._raise_non_finite(loss, norm)
        lr = learning_rate(step, training.num_steps, self.config.optimizer)
        self.optimizer.step(lr, clip_coefficient(norm, self.config.optimizer.clip_norm))
        self.progress.step += 1
        self.progress.samples_consumed += training.global_batch_size
        self._step_times.append(time.perf_counter() - started)
        self._report(loss, norm, lr)
        return stop

    def _forward_and_backward(self) -> torch.Tensor:
        """The pipeline's step; the sum of the loss over this data-parallel rank's tokens, gradients summed over all.

        Nothing can deadlock between a pipeline's messages and the collectives inside its stages. The ranks that share a
        stage (over tp and dp) have the same list of actions, each in a pipeline of its own; the lists of one pipeline
        cannot deadlock (lowering.py). Take the actions of all in the order in which that pipeline could do them one
        after the other: when it comes to an action, all ranks that share its stage have done what stands before it, so
        they all come to it, its messages are there, and its collectives find their partners.
        """
        training = self.config.training
        batch = self.data.training_batch(
            self.progress.samples_consumed, training.global_batch_size, self.mesh.dp_rank, self.mesh.dp_size
        )
        inputs, targets, keywords = batch.microbatches(training.microbatch_size, self.device)
        first_sample = self.mesh.dp_rank * training.microbatch_size * len(inputs)
        positions = [
            BatchPosition(self.progress.step, first_sample + i * training.microbatch_size, training.global_batch_size)
            for i in range(len(inputs))
        ]
        return self._accumulate_gradients(
            inputs,
            targets,
            loss_divisor=gradient_divisor(training.global_batch_size, self.data.targets_per_sample),
            stage_kwargs=[{"position": p, **keyword} for p, keyword in zip(positions, keywords, strict=True)],
        )

    def _sum_over_ranks(self, loss_sum: torch.Tensor) -> tuple[float, bool]:
        """The loss over all data-parallel ranks and whether any rank was asked to stop, in one message."""
        layer_ranks = self.mesh.tp_size * self.mesh.pp_size  # all of them have the loss of their data-parallel rank
        message = torch.stack([loss_sum / layer_ranks, loss_sum.new_tensor(float(self._stop_requested))])
        sum_over_ranks_(message, world_group())
        loss, stops = message.tolist()
        return loss, stops > 0

    def _raise_non_finite(self, loss: float, norm: float) -> None:
        # The sums have spread the NaN to every rank, so every rank is here.
        names = gather_json(non_finite_parameters(self.parameters, self.gradients)[:1], world_group())
        where = next(
            (f"; first such gradient: {name[0]} on rank {rank}" for rank, name in enumerate(names) if name), ""
        )
        raise NonFiniteError(
            f"step {self.progress.step + 1}: loss={loss} gradient_norm={norm}: not finite, the weights were not "
            f"updated{where}"
        )

    def _report(self, loss: float, norm: float, lr: float) -> None:
        step, speed = self.progress.step, self.tokens_per_s()
        if self.mesh.rank == 0:
            self.run_folder.append_metrics(
                {"step": step, "loss": loss, "gradient_norm": norm, "lr": lr, "tokens_per_s": round(speed, 1)}
            )
        seconds_left = (self.config.training.num_steps - step) * self._step_times[-1]
        self.reporter.step(step, loss, speed, seconds_left)

    def _evaluate(self) -> None:
        training = self.config.training
        self.model.eval()
        evaluation = evaluate(
            self.executor, self.data, self.mesh, training.global_batch_size, training.microbatch_size, self.device
        )
        self.model.train()
        record = {"step": self.progress.step, **dataclasses.asdict(evaluation)}
        if self.mesh.rank == 0:
            self.run_folder.append_metrics(record)
        self.reporter.say(f"step {self.progress.step}: {evaluation.describe()}")

    def _checkpoint_state(self) -> dict[str, Any]:
        return {
            "progress": dataclasses.asdict(self.progress),
            "vocab_size": self.model.vocab_size,
            "data": self.data.fingerprint,
            "config": dataclasses.asdict(self.config),
            "layout": self.layout(),
        }

    def _request_stop(self, *_: object) -> None:
        if self._stop_requested:  # asked twice: at once
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self._stop_requested = True
