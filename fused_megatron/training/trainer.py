"""Training loop of one rank: steps, evaluation, checks of replicas, checkpoints."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fused_megatron.assembly.assemble import Assembly
from fused_megatron.assembly.overlapping_steps import OverlappingStep, run_overlapping_steps, steps_until_pause
from fused_megatron.assembly.step_sums import StepSums
from fused_megatron.assembly.training_step import StepUnderWay, begin_step
from fused_megatron.checkpoint import BackgroundSave, Manifest, save_checkpoint
from fused_megatron.checkpoint.model_state import buffer_boxes, optimizer_boxes, parameter_boxes
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import SharedError, SharedInputError
from fused_megatron.collectives.together import gather_json
from fused_megatron.data.read_ahead import ReadAhead
from fused_megatron.data.training_data import TrainingData
from fused_megatron.data_parallel.gradient_division import gradient_divisor
from fused_megatron.observe.named_ranges import NamedRanges, marker_for
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
from fused_megatron.training.progress import Reporter
from fused_megatron.training.run_folder_lease import Lease
from fused_megatron.training.stashed_versions import stash_boxes, stash_boxes_to_fill
from fused_megatron.training.step_log import StepLog, now
from fused_megatron.training.step_recording import StepProfiler
from fused_megatron.training.step_rows import StepRows, read_step_rows
from fused_megatron.training.stop_request import REASONS, StopRequest

_NUM_REFUSING = 2
"""The first flags of Trainer._flags keep the weights as they are."""


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


@dataclass(frozen=True)
class _Begun:
    """A step that is not finished.

    Attributes:
        under_way: the step.
        number: its number, from 1 on.
        started: as time.perf_counter.
        num_targets: its targets, over all data-parallel ranks and microbatches.
        ended: when the device was through, if the host knows it already: on a CPU.
    """

    under_way: StepUnderWay
    number: int
    started: float
    num_targets: int
    ended: float | None


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
        self._batches = ReadAhead(partial(read_step_rows, data, self.config, self.mesh, self.device), self.device)
        self._profiler = StepProfiler(run.profile, self.mesh.rank, self.device, self.config.training.profile_steps)
        writes = run if self.mesh.rank == 0 else None
        self._log = StepLog(self.config, self.model.vocab_size, self.device, writes, reporter)
        self._ranges: NamedRanges | None = None
        if self.config.training.named_ranges:
            self._ranges = ranges = NamedRanges(self.model.stages, marker_for(self.device))
            self.executor.run_actions_in(lambda action: ranges.range(action_name(action)))
        self._begun: _Begun | None = None
        self._last_end = 0.0  # of the last finished step, as time.perf_counter

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
            self._log.product_flops_per_s = sum(speeds)
        stop = None
        last = False
        with (
            self._finished_saves(),
            self._checked_tokens(),
            self._batches,
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
        moments = optimizer_boxes(self.parameters, self.optimizer.state(), rows)
        return {**weights, **self.buffer_boxes(), **moments, **stash_boxes(self._assembly)}

    def stash_boxes_to_fill(self, checkpoint: Path, manifest: Manifest, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Make the older weights that a checkpoint has, and return them to be filled; see stashed_versions.py."""
        return stash_boxes_to_fill(self._assembly, checkpoint, manifest, saved)

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

    def train_step(self) -> str | None:
        """Do one optimizer step; return the reason to stop if any rank was asked to, the same on all ranks.

        With training.read_metrics_late this step is begun and the step before it finished. Both are finished where this
        one is compared, evaluated or saved, or where the run stops.

        With an asynchronous schedule it does the steps that overlap until the next pause.

        Raises:
            NonFiniteError: on every rank; the weights are not updated.
            SharedInputError: on every rank, if one has found damaged tokens.
            CheckpointError: on every rank, if the checkpoint that is written behind training has failed on one.
        """
        if self._assembly.updates is not None:
            return self._overlapping_steps()
        if self._beside is not None:
            self._beside.begin_step()
        with nullcontext() if self._ranges is None else self._ranges.step(self.progress.step + 1):
            before, self._begun = self._begun, self._begin_step()
            stop = None if before is None else self._finish_step(before)
            if stop is not None or not self._may_wait(self.progress.step):
                last, self._begun = self._begun, None
                stop = self._finish_step(last) or stop
        return stop

    def _overlapping_steps(self) -> str | None:
        """Do the steps until the next pause, drain the pipeline, and log them; return the reason to stop."""
        started, training = time.perf_counter(), self.config.training
        count = steps_until_pause(self.progress.step, training, self.config.parallel.steps_per_flush)
        read, steps = [], []
        for number in range(self.progress.step, self.progress.step + count):
            first = self.progress.samples_consumed
            end = first + training.global_batch_size
            read.append(self._batches.take(first, following=end if number + 1 < training.num_steps else None))
            self.progress.samples_consumed = end
            lr = learning_rate(number, training.num_steps, self.config.optimizer)
            steps.append(OverlappingStep(read[-1].batch, number, lr, read[-1].num_targets))
        pairs = sum(rows.visible_pairs for rows in read)
        self._background.before_update()
        sums = run_overlapping_steps(
            self._assembly, steps, lambda: self._flags(read[0]._replace(visible_pairs=pairs)), world_group()
        )
        seconds = (time.perf_counter() - started) / count
        of_steps = [
            StepSums(loss, norm, math.isfinite(loss) and math.isfinite(norm), sums.flags, torch.zeros(0))
            for loss, norm in zip(sums.losses, sums.gradient_norms, strict=True)
        ]
        reason = None
        for step, each in zip(steps, of_steps, strict=True):
            self.progress.step = step.number + 1
            self._judge(self.progress.step, each)
            reason = self._log_step(self.progress.step, seconds, each, step.lr, step.num_targets, {}, count)
        return reason

    def _may_wait(self, step: int) -> bool:
        """Return whether a step may be finished after the next has begun."""
        training = self.config.training
        if not training.read_metrics_late or self._beside is not None or step == training.num_steps:
            return False
        intervals = (training.replica_check_interval, training.eval_interval, training.checkpoint_interval)
        return not any(interval and step % interval == 0 for interval in intervals)

    def _begin_step(self) -> _Begun:
        started = time.perf_counter()
        training, step = self.config.training, self.progress.step
        first = self.progress.samples_consumed
        next_first = first + training.global_batch_size if step + 1 < training.num_steps else None
        rows = self._batches.take(first, following=next_first)
        lr = learning_rate(step, training.num_steps, self.config.optimizer)
        under_way = begin_step(
            self._assembly,
            lambda: rows.batch,
            step=step,
            lr=lr,
            num_targets=rows.num_targets,
            group=world_group(),
            flags=lambda: self._flags(rows),
            num_refusing=_NUM_REFUSING,
            before_update=self._background.before_update,
            refused_before=None if self._begun is None else self._begun.under_way.sums.refused,
        )
        self.progress.step += 1
        self.progress.samples_consumed += training.global_batch_size
        ended = time.perf_counter() if training.read_metrics_late and self.device.type == "cpu" else None
        return _Begun(under_way, self.progress.step, started, rows.num_targets, ended)

    def _finish_step(self, begun: _Begun) -> str | None:
        """Read the sums of a step and log it; return the reason to stop."""
        sums = begun.under_way.finish(lambda sums: self._judge(begun.number, sums))
        ended = time.perf_counter() if begun.ended is None else begun.ended
        seconds, self._last_end = ended - max(begun.started, self._last_end), ended
        compared = {} if self._beside is None else self._beside.end_step(seconds)
        return self._log_step(begun.number, seconds, sums, begun.under_way.lr, begun.num_targets, compared)

    def _log_step(
        self,
        number: int,
        seconds: float,
        sums: StepSums,
        lr: float,
        num_targets: int,
        compared: Mapping[str, float],
        num_steps: int = 1,
    ) -> str | None:
        """Log a step; return the reason to stop. The flags are sums over num_steps steps."""
        _, _, *counts = sums.flags
        documents = {}
        if self.data.mask_documents:
            documents = {"targets": num_targets, "visible_pairs": int(counts.pop()) // num_steps}
        loads = None
        if self.config.model.num_experts is not None:
            loads = self._assembly.expert_loads.report(sums.expert_loads, gradient_divisor(num_targets))
        self._log.add(number, seconds, sums, lr, {**documents, **compared}, loads)
        return next((reason for reason, count in zip(REASONS, counts, strict=True) if count), None)

    def _flags(self, rows: StepRows) -> list[float]:
        """Return this rank's numbers to sum over all ranks.

        Flags, 0 or 1: damaged tokens and a failed save, which keep the weights; each reason to stop. With
        mask_documents: the visible pairs of the rows of this rank.
        """
        asked = "a closed output" if self.reporter.is_closed else self._stop.asked
        check = self.data.token_check
        damage = float(check is not None and check.problem is not None)
        pairs = [float(rows.visible_pairs)] if self.data.mask_documents else []
        return [damage, float(self._background.failed), *(float(asked == reason) for reason in REASONS), *pairs]

    def _judge(self, number: int, sums: StepSums) -> None:
        """Raise, the same on every rank, if the weights were kept as they are."""
        if sums.flags[0]:
            check = self.data.token_check
            found = gather_json(None if check is None else check.problem, world_group())
            rank, problem = next((rank, problem) for rank, problem in enumerate(found) if problem)
            raise SharedInputError(f"step {number} on rank {rank}: {problem}")
        if sums.flags[1]:
            on_every_rank(self._background.finish)
        if not sums.finite:
            self._raise_non_finite(number, sums.loss, sums.gradient_norm)

    def _raise_non_finite(self, step: int, loss: float, norm: float) -> None:
        # Every rank calls this, since all ranks have the same sums.
        names = []
        if step == self.progress.step:  # otherwise these are the gradients of the step that follows
            names = non_finite_gradients(self.gradients.by_name(self.parameters))[:1]
        found = gather_json([norm, *names], world_group())
        norm = next((norm for norm, *_ in found if not math.isfinite(norm)), norm)
        where = next(
            (f"; first such gradient: {name[0]} on rank {rank}" for rank, (_, *name) in enumerate(found) if name), ""
        )
        kept = "the weights were not updated"
        if self._assembly.updates is not None:
            kept = "stages whose gradients are finite have updated; the checkpoints are from before"
        raise NonFiniteError(f"step {step}: loss={loss} gradient_norm={norm}: not finite, {kept}{where}")

    def _evaluate(self) -> None:
        self.model.eval()
        evaluation = evaluate(self._assembly, self.data)
        self.model.train()
        record = {"step": self.progress.step, **dataclasses.asdict(evaluation), "time": now()}
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
