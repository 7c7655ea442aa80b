"""Training loop of one rank: steps, evaluation, checks of replicas, checkpoints."""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fused_megatron.assembly.assemble import Assembly
from fused_megatron.assembly.training_step import StepSums, training_step
from fused_megatron.checkpoint import BackgroundSave, save_checkpoint
from fused_megatron.checkpoint.model_state import buffer_boxes, optimizer_boxes, parameter_boxes
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import SharedError, SharedInputError
from fused_megatron.collectives.together import gather_json
from fused_megatron.data.batch import Batch
from fused_megatron.data.documents import num_visible_pairs
from fused_megatron.data.training_data import TrainingData
from fused_megatron.data_parallel.gradient_division import gradient_divisor
from fused_megatron.mesh import coordinates
from fused_megatron.models.expert_loads import LoadReport
from fused_megatron.observe.model_flops import gpt_step_flops
from fused_megatron.observe.named_ranges import NamedRanges, marker_for
from fused_megatron.observe.peak_memory import peak_memory_bytes
from fused_megatron.observe.product_speed import product_flops_per_s
from fused_megatron.pipeline.schedule.action import Action
from fused_megatron.planning.prediction.beside_measured import BesideMeasured
from fused_megatron.reference.philox import MASK_VERSION
from fused_megatron.sharding import mark_all_shards
from fused_megatron.sharding.gradient_norm import non_finite_gradients
from fused_megatron.training.evaluation import evaluate
from fused_megatron.training.learning_rate import learning_rate
from fused_megatron.training.loss_plot import draw_losses
from fused_megatron.training.presence import lost_contact
from fused_megatron.training.process_group import new_group_for_saves, on_every_rank, world_group
from fused_megatron.training.progress import Reporter, StepFigures
from fused_megatron.training.run_folder_lease import Lease
from fused_megatron.training.step_recording import StepProfiler
from fused_megatron.training.stop_request import REASONS, StopRequest


class TrainingError(SharedError, RuntimeError):
    """The run must not go on; every rank raises this error."""


class NonFiniteError(TrainingError):
    """The loss or a gradient became NaN or infinite; the weights have not been updated with it."""


class DriftError(TrainingError):
    """Ranks that hold the same weights hold different values."""


@dataclass
class Progress:
    """Counters of a run that a resumed run needs besides the tensors."""

    step: int = 0
    samples_consumed: int = 0


class Trainer:
    """Training of a model from its data; run() trains to the last step.

    Args:
        assembly: config, mesh, and this rank's stages, executor and optimizer.
        data: training and held-out tokens.
        run: folder for metrics and checkpoints (rank 0 writes everything but the other ranks' checkpoint shards).
        reporter: output for the user.
        stop: request that may end the run early; None: a new one.
        lease: of the run folder, on the rank that holds it.
        beside: the prediction of a step, to be compared with each step; None: no comparison.
    """

    def __init__(
        self,
        assembly: Assembly,
        data: TrainingData,
        run: RunFolder,
        reporter: Reporter,
        stop: StopRequest | None = None,
        lease: Lease | None = None,
        beside: BesideMeasured | None = None,
    ) -> None:
        self.config = assembly.config
        self.mesh = assembly.mesh
        self.plan = assembly.plan
        self.model = assembly.model
        self.parameters = assembly.parameters
        self.gradients = assembly.gradients
        self.executor = assembly.executor
        self.optimizer = assembly.optimizer
        self.weights = assembly.weights
        self.own_weights = assembly.own_weights
        self.device = assembly.device
        self.data = data
        self.run_folder = run
        self.reporter = reporter
        self._assembly = assembly
        self.progress = Progress()
        self._stop = StopRequest() if stop is None else stop
        self._lease = lease
        self._beside = beside
        self._background = BackgroundSave(new_group_for_saves(self.config.parallel.timeout_s))
        self._visible_pairs = 0
        self._profiler = StepProfiler(run.profile, self.mesh.rank, self.device, self.config.training.profile_steps)
        self._product_flops_per_s: float | None = None
        self._ranges: NamedRanges | None = None
        if self.config.training.named_ranges:
            self._ranges = ranges = NamedRanges(self.model.stages, marker_for(self.device))
            self.executor.run_actions_in(lambda action: ranges.range(action_name(action)))
        self._step_times: deque[float] = deque(maxlen=20)

    def run(self) -> str | None:
        """Train up to step config.training.num_steps, or until a stop is requested; write a checkpoint at the end.

        Signals still count as requests when this returns or raises, until stop.end(). When a rank is lost, launchers
        send SIGTERM to the remaining ranks, and these must stay alive to report the failure.

        Returns:
            The reason of StopRequest that ended the run early; None if the run is complete.
        """
        training = self.config.training
        self._stop.begin()
        if self.progress.step < training.num_steps:
            dtype = next(iter(self.parameters.values())).dtype
            speeds = gather_json(product_flops_per_s(self.device, dtype), world_group())
            self._product_flops_per_s = sum(speeds)
        stop = None
        last = False
        with (
            self._finished_saves(),
            self._checked_tokens(),
            self.reporter.steps(self.progress.step, training.num_steps),
        ):
            while stop is None and self.progress.step < training.num_steps:
                self._profiler.begin_step()
                stop = self.train_step()
                self._say_profiled(self._profiler.end_step())
                step = self.progress.step
                last = step == training.num_steps
                # Before the checkpoint of this step: drifted weights must not be saved.
                if training.replica_check_interval and step % training.replica_check_interval == 0:
                    self.check_replicas()
                if step % training.eval_interval == 0 or last:
                    self._evaluate()
                if step % training.checkpoint_interval == 0 or last or stop:
                    self.save()
        self._say_profiled(self._profiler.close())
        return None if last else stop

    def _say_profiled(self, trace: Path | None) -> None:
        if trace is not None:
            self.reporter.say(f"recorded steps: {trace} (opens in https://ui.perfetto.dev)")

    @contextmanager
    def _finished_saves(self) -> Iterator[None]:
        """Let the save that is under way at the end of the context reach the disk, also after an error."""
        try:
            yield
        except Exception as error:
            if not lost_contact(error):  # a save needs every rank
                with suppress(Exception):  # the first error is the one to raise
                    self._background.finish()
            raise
        on_every_rank(self._background.finish)

    @contextmanager
    def _checked_tokens(self) -> Iterator[None]:
        """Verify large token files in the background while the context is open."""
        check = self.data.token_check
        if check is None:
            yield
            return
        check.start()
        try:
            yield
        finally:
            check.close()

    def tensor_boxes(self) -> dict[str, Any]:
        """Return this rank's part of every tensor of a checkpoint, by name, as boxes of the full tensors."""
        mark_all_shards(self.model)
        rows = self.gradients.replicas.rows
        weights = parameter_boxes(self.parameters, self.own_weights, rows)
        return {**weights, **self.buffer_boxes(), **optimizer_boxes(self.parameters, self.optimizer.state(), rows)}

    def buffer_boxes(self) -> dict[str, Any]:
        """Return the buffers of this rank's stages that a checkpoint keeps, as boxes: the state of routers."""
        return {name: box for stage in self.model.stages.values() for name, box in buffer_boxes(stage).items()}

    def rank_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that a checkpoint keeps for each rank: states of torch's random number generators."""
        states = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def set_rank_tensors(self, states: Mapping[str, torch.Tensor]) -> None:
        """Restore the states that rank_tensors() returned."""
        if "rng.cpu" in states:
            torch.set_rng_state(states["rng.cpu"])
        if "rng.cuda" in states:
            torch.cuda.set_rng_state(states["rng.cuda"], self.device)

    def layout(self) -> dict[str, int]:
        """Return the size of each mesh axis."""
        return dict(self.mesh.sizes)

    def save(self) -> None:
        """Write a checkpoint of the current step, behind the steps that follow or (async_checkpoint=False) at once.

        Every rank must call this. Only one save is under way: this one waits for the save before.

        Raises:
            CheckpointError: on every rank, as save_checkpoint, or if another run has taken the run folder, or if the
                save before failed.
        """
        on_every_rank(self._check_before_save)
        folder, step, tensors = self.run_folder.checkpoints, self.progress.step, self.tensor_boxes()
        options: dict[str, Any] = {
            "state": self._checkpoint_state(),
            "rank_tensors": self.rank_tensors(),
            "keep": self.config.training.keep_checkpoints,
        }
        if self.config.training.async_checkpoint:
            self._background.start(folder, step, tensors, **options)
        else:
            save_checkpoint(folder, step, tensors, **options, group=world_group())

    def _check_before_save(self) -> None:
        """Wait for the save before; raise its error, or an error if another run has taken the run folder."""
        self._background.finish()
        if self._lease is not None:
            self._lease.check()

    def check_replicas(self) -> None:
        """Compare weights that several ranks hold; see Assembly.find_drift.

        Raises:
            DriftError: on every rank; it names the ranks and the parameter.

        Communication: as Assembly.find_drift, and one exchange of JSON.
        """
        drift = self._assembly.find_drift()
        found = next(filter(None, gather_json(drift, world_group())), None)
        if found is not None:
            raise DriftError(
                f"step {self.progress.step}: ranks drifted apart: {found} (faulty memory, or code that changes weights "
                "on some ranks only; the same command goes on from the newest checkpoint)"
            )

    def tokens_per_s(self) -> float:
        """Return the median speed of the latest steps, in tokens per second over all ranks."""
        if not self._step_times:
            return 0.0
        seconds = sorted(self._step_times)[len(self._step_times) // 2]
        return self.config.training.global_batch_size * self.config.model.seq_len / seconds

    def train_step(self) -> str | None:
        """Do one optimizer step; return the reason to stop if any rank was asked to, the same on all ranks.

        Raises:
            NonFiniteError: on every rank; the weights are not updated.
            SharedInputError: on every rank, if one has found damaged tokens.
            CheckpointError: on every rank, if the checkpoint that is written behind training has failed on one.
        """
        if self._beside is not None:
            self._beside.begin_step()
        started = time.perf_counter()
        training, step = self.config.training, self.progress.step
        first = self.progress.samples_consumed
        num_targets = self.data.num_targets(first, training.global_batch_size)
        lr = learning_rate(step, training.num_steps, self.config.optimizer)
        with nullcontext() if self._ranges is None else self._ranges.step(step + 1):
            sums = training_step(
                self._assembly,
                lambda: self._read_batch(first),
                step=step,
                lr=lr,
                num_targets=num_targets,
                group=world_group(),
                flags=self._flags,
                judge=self._judge,
            )
        self.progress.step += 1
        self.progress.samples_consumed += training.global_batch_size
        self._step_times.append(time.perf_counter() - started)
        compared = {} if self._beside is None else self._beside.end_step(self._step_times[-1])
        _, _, *counts = sums.flags
        documents = {}
        if self.data.mask_documents:
            documents = {"targets": num_targets, "visible_pairs": int(counts.pop())}
        loads = None
        if self.config.model.num_experts is not None:
            loads = self._assembly.expert_loads.report(sums.expert_loads, gradient_divisor(num_targets))
        self._report(sums, lr, {**documents, **compared}, loads)
        return next((reason for reason, count in zip(REASONS, counts, strict=True) if count), None)

    def _read_batch(self, first: int) -> Batch:
        """Read this data-parallel rank's rows, and count the pairs that attention leaves visible in them."""
        mesh = self.mesh
        batch = self.data.training_batch(first, self.config.training.global_batch_size, mesh.dp_rank, mesh.dp_size)
        # Only one of the ranks that read the same rows counts them.
        first_of_rows = not any(i for axis, i in coordinates(mesh.rank, mesh.sizes).items() if axis != "dp")
        if batch.document_starts is not None and first_of_rows:
            self._visible_pairs = num_visible_pairs(batch.document_starts, self.config.model.sliding_window)
        return batch

    def _flags(self) -> list[float]:
        """Return this rank's numbers to sum over all ranks.

        Flags, 0 or 1: damaged tokens, a failed save, each reason to stop. With mask_documents: the visible pairs of the
        rows of this rank.
        """
        asked = "a closed output" if self.reporter.is_closed else self._stop.asked
        check = self.data.token_check
        damage = float(check is not None and check.problem is not None)
        pairs = [float(self._visible_pairs)] if self.data.mask_documents else []
        return [damage, float(self._background.failed), *(float(asked == reason) for reason in REASONS), *pairs]

    def _judge(self, sums: StepSums) -> None:
        """Raise, the same on every rank, if the weights must not be updated."""
        if sums.flags[0]:
            check = self.data.token_check
            found = gather_json(None if check is None else check.problem, world_group())
            rank, problem = next((rank, problem) for rank, problem in enumerate(found) if problem)
            raise SharedInputError(f"step {self.progress.step + 1} on rank {rank}: {problem}")
        if sums.flags[1]:
            on_every_rank(self._background.finish)
        if not sums.finite:
            self._raise_non_finite(sums.loss, sums.gradient_norm)
        self._background.before_update()

    def _raise_non_finite(self, loss: float, norm: float) -> None:
        # Every rank calls this, since all ranks have the same sums.
        names = non_finite_gradients(self.gradients.by_name(self.parameters))[:1]
        found = gather_json([norm, *names], world_group())
        norm = next((norm for norm, *_ in found if not math.isfinite(norm)), norm)
        where = next(
            (f"; first such gradient: {name[0]} on rank {rank}" for rank, (_, *name) in enumerate(found) if name), ""
        )
        raise NonFiniteError(
            f"step {self.progress.step + 1}: loss={loss} gradient_norm={norm}: not finite, the weights were not "
            f"updated{where}"
        )

    def _report(self, sums: StepSums, lr: float, more: Mapping[str, float], loads: LoadReport | None) -> None:
        step, speed = self.progress.step, self.tokens_per_s()
        # The metrics compare with the held-out loss, which has no auxiliary loss.
        loss = sums.loss if loads is None else sums.loss - loads.balance_loss - loads.z_loss
        seconds = self._step_times[-1]
        mfu = self._mfu(seconds, more.get("visible_pairs"))
        peak = peak_memory_bytes(self.device)
        if self.mesh.rank == 0:
            self.run_folder.append_metrics(
                {
                    "step": step,
                    "loss": loss,
                    "gradient_norm": sums.gradient_norm,
                    "lr": lr,
                    "tokens_per_s": round(speed, 1),
                    "step_s": seconds,
                    "mfu": mfu,
                    "peak_memory_bytes": peak,
                    "time": _now(),
                    **more,
                    **({} if loads is None else loads.metrics()),
                }
            )
        seconds_left = (self.config.training.num_steps - step) * seconds
        text = "" if loads is None else loads.text()
        figures = StepFigures(loss, sums.gradient_norm, seconds, speed, seconds_left, mfu, peak, text)
        self.reporter.step(step, figures)

    def _mfu(self, seconds: float, visible_pairs: float | None) -> float | None:
        """Return model FLOPs / seconds / FLOP/s of large matrix products on all ranks, as in a report of benchmarks."""
        if self._product_flops_per_s is None:
            return None
        config = dataclasses.replace(self.config.model, vocab_size=self.model.vocab_size)
        num_tokens = self.config.training.global_batch_size * config.seq_len
        flops, _ = gpt_step_flops(
            config, num_tokens, visible_pairs=None if visible_pairs is None else int(visible_pairs)
        )
        return flops / seconds / self._product_flops_per_s

    def _evaluate(self) -> None:
        self.model.eval()
        evaluation = evaluate(self._assembly, self.data)
        self.model.train()
        record = {"step": self.progress.step, **dataclasses.asdict(evaluation), "time": _now()}
        self.reporter.held_out(evaluation.validation_loss)
        if self.mesh.rank == 0:
            self.run_folder.append_metrics(record)
            if self.progress.step < self.config.training.num_steps:  # the end of the run draws the last picture
                draw_losses(self.run_folder)
        self.reporter.say(f"step {self.progress.step}: {evaluation.describe()}")

    def _checkpoint_state(self) -> dict[str, Any]:
        return {
            "progress": dataclasses.asdict(self.progress),
            "vocab_size": self.model.vocab_size,
            "data": self.data.fingerprint,
            "config": dataclasses.asdict(self.config),
            "layout": self.layout(),
            "dropout_mask": MASK_VERSION,
        }


def action_name(action: Action) -> str:
    """Return the name of a pipeline action's range: "forward stage 0 microbatch 2"."""
    microbatch = "" if action.index is None else f" microbatch {action.index}"
    return f"{action.kind.name.lower().replace('_', ' ')} stage {action.stage}{microbatch}"


def _now() -> str:
    """Return the time in UTC, as in 2026-11-30T18:05:00.123Z."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
