"""A training run from start to end: ranks, data, model, newest checkpoint, training loop, results."""

import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fused_megatron.assembly.assemble import assemble
from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.pipeline_plan import PipelinePlan, plan_pipeline
from fused_megatron.checkpoint import checkpoint_to_resume, load_checkpoint, read_manifest
from fused_megatron.checkpoint.model_state import parameter_boxes
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checkpoint.run_state import read_run_state
from fused_megatron.checks import InputError, found_on_every_rank
from fused_megatron.collectives.together import gather_json
from fused_megatron.config import TrainConfig, TransformerConfig
from fused_megatron.data.training_data import TrainingData, open_training_data
from fused_megatron.inference.generation import generate
from fused_megatron.kept_pages import keep_malloc_pages
from fused_megatron.mesh import Mesh
from fused_megatron.models.block_graphs import capture_blocks, check_graph_device
from fused_megatron.models.overlap_report import overlap_lines, stage_overlap
from fused_megatron.optional_packages import install_command
from fused_megatron.pipeline.view.recording import Recorder
from fused_megatron.planning.prediction.beside_measured import (
    BesideMeasured,
    conclusion,
    predict_run,
    prediction_lines,
)
from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.prediction.step_time import StepPrediction
from fused_megatron.training.device_settings import on_device
from fused_megatron.training.loss_plot import draw_losses, plot_loss
from fused_megatron.training.memory_check import check_memory
from fused_megatron.training.out_of_memory import explain_shortage
from fused_megatron.training.presence import Presence
from fused_megatron.training.process_group import ThisRank, joined_ranks, on_every_rank, world_group
from fused_megatron.training.progress import Reporter
from fused_megatron.training.resume import (
    ResumedTensors,
    check_same_state,
    learning_rate_jump,
    other_dropout_masks,
    other_update_rule,
    settings_that_differ,
)
from fused_megatron.training.run_folder_lease import Lease
from fused_megatron.training.same_start import check_same_config, check_same_data
from fused_megatron.training.stashed_versions import ANY as STASHED
from fused_megatron.training.stop_request import StopRequest
from fused_megatron.training.trackers import Tracker, open_trackers
from fused_megatron.training.trainer import Progress, Trainer, TrainingError

HEAD_START_S = 0.5
# Fields of the model's config that may change between a checkpoint and the run that resumes from it.
FREE_FIELDS = {
    "init_std",
    "hidden_dropout",
    "attention_dropout",
    "attention_dropout_kernel",
    "embedding_dropout",
    "recompute",
    "recompute_blocks",
    "balance_loss",
    "balance_loss_over",
    "router_z_loss",
    "router_jitter",
    "capacity_factor",
}
# The state of routers depends on free fields: a run may start it, or drop the loads of the step before.
ROUTER_BUFFERS = "model.blocks.*.mlp.router."


def train(config: TrainConfig, run_path: Path, stop: StopRequest | None = None) -> bool:
    """Train by the config in the folder run_path, and resume from its newest good checkpoint if there is one.

    Every rank must call this.

    Args:
        config: of the run.
        run_path: the run folder; only one run at a time may write there.
        stop: stop request of the caller, who must end it. None: make one, and restore the signal handlers at the end.

    Returns:
        True if the run trained to its last step; False if a signal or the end of the launcher stopped it early, after
        a checkpoint.

    Raises:
        InputError: on every rank, before any training: sizes, data or a checkpoint do not fit, none of the existing
            checkpoints can be read, or another run holds the folder.
        TrainingError: on every rank: the loss or a gradient is not finite, or weights of ranks drifted apart.
        LostRankError: on every remaining rank; it names the lost ranks.
        MemoryShortageError: on a rank that got no memory for a tensor.
    """
    _check_trainable(config.model)
    plan = plan_pipeline(config, asynchronous=True)
    request = StopRequest() if stop is None else stop
    with joined_ranks(config.parallel.timeout_s) as this_rank:
        presence = Presence(config.parallel.timeout_s)
        try:
            finished = _train(config, plan, run_path, this_rank, request)
        except TrainingError:
            raise
        except RuntimeError as error:
            explained = presence.explain(explain_shortage(error))
            if explained is error:
                raise
            raise explained from error
        presence.close()
    if stop is None:
        request.end()
    return finished


def _train(config: TrainConfig, plan: PipelinePlan, run_path: Path, this_rank: ThisRank, stop: StopRequest) -> bool:
    # In every process, before its first large tensor.
    pages_kept = this_rank.device.type == "cpu" and keep_malloc_pages()
    with found_on_every_rank():
        if config.training.cuda_graphs != "off":
            check_graph_device(this_rank.device)
    reporter = Reporter(this_rank.rank == 0, config.training.log_interval)
    config = on_device(config, this_rank.device.type, reporter.say)
    run = RunFolder(run_path)
    configs = gather_json(dataclasses.asdict(config), world_group())
    on_every_rank(lambda: check_same_config(*configs))
    lease = Lease(run.lease)
    try:
        mesh, data = on_every_rank(lambda: _set_up(config, this_rank, run, lease, reporter))
        (holder, *_) = gather_json(lease.run, world_group())
        on_every_rank(lambda: lease.check_seen(holder))
        contents = gather_json(dict(data.content), world_group())
        on_every_rank(lambda: check_same_data(*contents))
        model_config = dataclasses.replace(config.model, vocab_size=data.vocab_size)
        whole = dataclasses.replace(config, model=model_config)
        check_memory(whole, mesh, this_rank.device, data.content["vocabulary_source"])
        model = build_stages(whole, mesh, plan, this_rank.device)
        beside = _predict(whole, mesh, run, reporter)
        assembly = assemble(config, mesh, plan, model, None if beside is None else beside.observe)
        if whole.training.cuda_graphs == "block":
            for stage in model.stages.values():
                capture_blocks(stage, whole.training.microbatch_size)
        trainer = Trainer(assembly, data, run, reporter, stop, lease, beside)
        _resume(trainer, model_config)
        _introduce(trainer)
        _report_overlap(trainer)
        if pages_kept:
            reporter.say(
                "malloc keeps the pages of freed tensors: the same numbers, without faulting them in each step"
            )
        started = time.perf_counter()
        try:
            stopped_by = trainer.run()
        finally:
            for listener in trainer.run_folder.listeners:
                if isinstance(listener, Tracker):
                    listener.close()
        _conclude(trainer, stopped_by, time.perf_counter() - started)
        trainer.executor.close()
        on_every_rank(lambda: None)  # a launcher may end the others as soon as one has ended with a code other than 0
        return stopped_by is None
    finally:
        lease.give_back()


def _check_trainable(config: TransformerConfig) -> None:
    """Raise SharedInputError if the model cannot be trained; every rank finds the same fault."""
    with found_on_every_rank():
        config.check_trainable()


def _set_up(
    config: TrainConfig, this_rank: ThisRank, run: RunFolder, lease: Lease, reporter: Reporter
) -> tuple[Mesh, TrainingData]:
    mesh = build_mesh(config, this_rank.device.type)
    if this_rank.rank == 0:
        run.create()
        lease.take(reporter.say)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # One rank of a machine prepares the text while the others wait. Let it be local rank 0, which shows progress.
        time.sleep(HEAD_START_S)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return mesh, open_training_data(config, reporter.stage, local_rank, local_world_size)


def _predict(config: TrainConfig, mesh: Mesh, run: RunFolder, reporter: Reporter) -> BesideMeasured | None:
    """Predict and print the step of the run on training.cluster, on rank 0, for the comparison with measured steps."""
    name = config.training.cluster
    if name is None:
        return None

    def predict() -> StepPrediction | None:
        if mesh.rank != 0:
            return None
        cluster = load_cluster(name)
        prediction = predict_run(config, mesh, cluster)
        for line in prediction_lines(prediction, cluster):
            reporter.say(line)
        return prediction

    return BesideMeasured(Recorder(mesh.pp_group), on_every_rank(predict), run.timelines)


def _resume(trainer: Trainer, model_config: TransformerConfig) -> None:
    group = world_group()
    checkpoint = checkpoint_to_resume(trainer.run_folder.checkpoints, group=group)
    if checkpoint is not None:
        data = trainer.data
        check_tokenizer = partial(trainer.run_folder.check_tokenizer, data.tokenizer_path, data.description)
        state = on_every_rank(lambda: _state_of_same_run(checkpoint, model_config, trainer.config, check_tokenizer))
        # In another layout the ranks differ, so their random number generators start anew.
        same_layout = {"cp": 1, **state.get("layout", {})} == trainer.layout()
        rank_tensors = trainer.rank_tensors() if same_layout else None
        weights_only = state.get("weights_only", False)  # True for an imported model
        if weights_only:
            boxes = parameter_boxes(trainer.parameters, trainer.own_weights, trainer.gradients.replicas.rows)
            buffers = trainer.buffer_boxes()
            load_checkpoint(
                checkpoint, boxes | buffers, rank_tensors=rank_tensors, group=group, allow_missing=tuple(buffers)
            )
            trainer.optimizer.reset_main_weights()
        else:
            manifest = read_manifest(checkpoint)
            resumed = ResumedTensors(
                trainer.parameters,
                trainer.own_weights,
                trainer.optimizer,
                trainer.gradients.replicas.rows,
                manifest,
            )
            stashed = on_every_rank(lambda: trainer.stash_boxes_to_fill(checkpoint, manifest, state["config"]))
            load_checkpoint(
                checkpoint,
                resumed.boxes | trainer.buffer_boxes() | stashed,
                rank_tensors=rank_tensors,
                group=group,
                allow_missing=(f"{ROUTER_BUFFERS}previous_load", f"{ROUTER_BUFFERS}selection_bias"),
                # A synchronous schedule reads no older weights.
                allow_extra=(
                    *resumed.allow_extra,
                    f"{ROUTER_BUFFERS}previous_load",
                    *([] if trainer.executor.stashed else [STASHED]),
                ),
            )
            resumed.finish()
        trainer.weights.start()
        trainer.set_rank_tensors(rank_tensors or {})
        trainer.progress = Progress(**state["progress"])
        trainer.optimizer.set_step(trainer.progress.step)
        trainer.reporter.say(f"resuming from {checkpoint} (step {trainer.progress.step})")
        if not weights_only:
            _report_differing_settings(trainer, state["config"])
            other_masks = other_dropout_masks(state, model_config)
            if other_masks is not None:
                trainer.reporter.say(f"warning: {checkpoint} {other_masks}")
        if not weights_only and state.get("data") != trainer.data.fingerprint:
            trainer.reporter.say(
                f"warning: {checkpoint} was trained on other data than {trainer.data.description}; the run goes on "
                f"after the same number of samples ({trainer.progress.samples_consumed})"
            )
    on_every_rank(lambda: _begin_records(trainer) if trainer.mesh.rank == 0 else None)


def _report_differing_settings(trainer: Trainer, saved: dict[str, Any]) -> None:
    differing = settings_that_differ(saved, trainer.config)
    if differing:
        trainer.reporter.say(f"not as in the checkpoint: {'; '.join(differing)}")
    rule = other_update_rule(saved, trainer.config)
    if rule is not None:
        trainer.reporter.say(f"warning: {rule}")
    jump = learning_rate_jump(saved, trainer.config, trainer.progress.step)
    if jump is not None:
        trainer.reporter.say(f"warning: {jump}")


def _begin_records(trainer: Trainer) -> None:
    # Only after the checkpoint is loaded: a config that does not fit it must not replace the stored config.
    trainer.run_folder.describe(trainer.config, trainer.data.tokenizer_path)
    trainer.run_folder.forget_metrics_after(trainer.progress.step)
    if trainer.config.training.tensorboard:
        trainer.run_folder.open_tensorboard(trainer.progress.step)
    trackers = trainer.config.training.trackers
    trainer.run_folder.listeners += open_trackers(trackers, trainer.run_folder.path, dataclasses.asdict(trainer.config))


def _state_of_same_run(
    checkpoint: Path, model_config: TransformerConfig, config: TrainConfig, check_tokenizer: Callable[[], None]
) -> dict[str, Any]:
    """Read the run state of a checkpoint; raise InputError unless model and optimizer have the same tensors.

    check_tokenizer raises InputError for text of another tokenizer. A model of another kind is named before that.
    """
    state = read_run_state(checkpoint)
    # A field that is missing in the checkpoint had its default value when it was written.
    known = dataclasses.asdict(type(model_config)()) | {"family": "gpt"}
    saved = known | state["config"]["model"] | {"vocab_size": state["vocab_size"]}
    # Rotary positions have no table whose length must equal seq_len.
    free = FREE_FIELDS | ({"seq_len"} if model_config.position == "rotary" else set())
    if model_config.router_bias_rate is not None:
        free = free | {"router_bias_rate"}  # a run without a bias would lose the checkpoint's
    here = dataclasses.asdict(model_config)
    others = [name for name, value in here.items() if name not in free and saved.get(name) != value]
    if others in ([], ["vocab_size"]):  # another size of the vocabulary comes from another tokenizer
        check_tokenizer()
    if others:
        name = others[0]
        raise InputError(
            f"{checkpoint} is of another model: {name}={saved.get(name)} there, {name}={here[name]} here "
            f"(choose another training.run_folder, or set model.{name}={saved.get(name)})"
        )
    if not state.get("weights_only", False):
        check_same_state(checkpoint, state["config"], config)
    return state


def _introduce(trainer: Trainer) -> None:
    mesh, config = trainer.mesh, trainer.config
    counts = gather_json([trainer.model.num_parameters(), trainer.model.num_active_parameters()], mesh.pp_group)
    num_parameters, num_active = map(sum, zip(*counts, strict=True))
    active = f" ({num_active:,} for each token)" if num_active < num_parameters else ""
    spans = trainer.model.spans
    blocks = "+".join(str(span.stop - span.start) for span in spans)
    pipeline = f" {trainer.plan.name} of {blocks} blocks" if len(spans) > 1 else ""
    family = config.model.family.upper()
    ranks = f"rank{'s' if mesh.world_size > 1 else ''}"
    trainer.reporter.say(
        f"{family} with {num_parameters:,} parameters{active} in {config.training.weight_dtype} on {mesh.world_size} "
        f"{trainer.device.type} {ranks} (tp={mesh.tp_size} pp={mesh.pp_size}"
        f"{pipeline} dp={mesh.dp_size}{config.parallel.expert_text}{config.parallel.sequence_text}); "
        f"run folder {trainer.run_folder.path}"
    )
    if trainer.progress.step >= config.training.num_steps:
        trainer.reporter.say(
            f"nothing to train: step {trainer.progress.step} of {config.training.num_steps} is done "
            f"(raise training.num_steps, or choose another training.run_folder)"
        )


def _report_overlap(trainer: Trainer) -> None:
    """Print what hides under the tensor-parallel products of this rank's stages; ranks of a group may time it."""
    config = trainer.config
    rows = stage_overlap(trainer.model.stages, config, measures=config.training.profile_steps > 0)
    for line in overlap_lines(rows):
        trainer.reporter.say(line)


def _conclude(trainer: Trainer, stopped_by: str | None, seconds: float) -> None:
    reporter, run = trainer.reporter, trainer.run_folder
    if stopped_by is not None:
        if trainer.mesh.rank == 0:
            draw_losses(run)
        reporter.say(f"stopped by {stopped_by} after step {trainer.progress.step}; the checkpoint is written")
        return
    lines = _generated_lines(trainer)  # on every rank: the layers are shared
    if trainer.mesh.rank != 0:
        return
    try:
        records = run.read_metrics()
        drawn = plot_loss(records, run.loss_picture, title=run.path.name)
    except OSError as error:  # not fatal: the last checkpoint holds the result of the run
        reporter.say(f"{run.path}: no table and no picture: {error.strerror or error}")
        return
    losses = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "validation_loss" in r]
    rows = {"steps": f"{trainer.progress.step}", "training time": f"{seconds:.0f} s"}
    if losses:
        rows["training loss"] = f"{losses[0]['loss']:.3f} -> {losses[-1]['loss']:.3f} nats per token"
        rows["speed"] = f"{sorted(r['tokens_per_s'] for r in losses)[len(losses) // 2]:,.0f} tokens/s"
    predicted = conclusion(losses)
    if predicted is not None:
        rows["step"] = predicted
    if evaluations:
        rows["held-out loss"] = f"{evaluations[-1]['validation_loss']:.3f} nats per token"
        if evaluations[-1]["bits_per_byte"] is not None:
            rows["held-out bits per byte"] = f"{evaluations[-1]['bits_per_byte']:.3f}"
    reporter.table("Results", rows)
    picture = run.loss_picture.name if drawn else f"no picture: {install_command('matplotlib')}"
    reporter.say(f"{run.path}: {run.config.name}, {run.metrics.name}, {picture}, {run.checkpoints.name}/")
    if lines:
        reporter.say("Three document beginnings that the model wrote:")
    for line in lines:
        reporter.say(line)


def _generated_lines(trainer: Trainer, num_lines: int = 3, num_tokens: int = 40) -> list[str]:
    tokenizer = trainer.data.tokenizer
    if tokenizer is None or trainer.data.masking is not None:
        return []
    start = torch.full((num_lines, 1), tokenizer.end_of_document, dtype=torch.int64, device=trainer.device)
    with trainer.weights.whole():
        tokens = generate(trainer.model, start, num_tokens, seed=trainer.config.training.seed)
    return [f"  {i}. " + repr(tokenizer.decode(row[1:].tolist()))[1:-1] for i, row in enumerate(tokens, 1)]
