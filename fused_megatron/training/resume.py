"""Resuming from a checkpoint with other settings or in another dtype."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_megatron.checkpoint import Manifest, TensorBox
from fused_megatron.checkpoint.model_state import optimizer_boxes, parameter_boxes
from fused_megatron.checks import InputError, check
from fused_megatron.config import OptimizerConfig, TrainConfig
from fused_megatron.config.model import TransformerConfig
from fused_megatron.data_parallel.optimizer import Optimizer
from fused_megatron.pipeline.schedule.schedules import ASYNCHRONOUS
from fused_megatron.reference.philox import MASK_VERSION
from fused_megatron.sharding import Rows
from fused_megatron.training.learning_rate import learning_rate

# Settings that change no trained weight: parallel layout, paths, output and intervals. None: the whole section.
_WITHOUT_EFFECT = {
    "parallel": None,
    "data": {"cache_folder"},
    "training": {
        *{"run_folder", "microbatch_size", "bucket_mb", "eval_interval", "eval_batches", "log_interval"},
        *{
            *{"read_metrics_late", "cuda_graphs"},
            "checkpoint_interval",
            "keep_checkpoints",
            "async_checkpoint",
            "tensorboard",
            "replica_check_interval",
        },
    },
}
_MODEL, _MAIN = "model.", "optimizer.main."


def settings_that_differ(saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Return a line for every setting that affects the trained weights and differs from the checkpoint's.

    Args:
        saved: the config in a checkpoint; a setting that is missing there had its default value.
        config: of the run that resumes from the checkpoint.
    """
    lines = []
    for section in dataclasses.fields(config):
        ours = getattr(config, section.name)
        free = _WITHOUT_EFFECT.get(section.name, set())
        if free is None or section.name not in saved:
            continue
        theirs = dataclasses.asdict(type(ours)()) | saved[section.name]
        for name, value in json.loads(json.dumps(dataclasses.asdict(ours))).items():
            there = json.loads(json.dumps(theirs.get(name)))
            # vocab_size=None means that the data decided.
            if name in free or there == value or (name == "vocab_size" and None in (there, value)):
                continue
            lines.append(f"{section.name}.{name}={_shown(there)} there, {_shown(value)} here")
    return lines


def other_update_rule(saved: Mapping[str, Any], config: TrainConfig) -> str | None:
    """Describe a schedule that changes the update rule, in the checkpoint or here, if the other has another one."""
    here, there = config.parallel.schedule, saved.get("parallel", {}).get("schedule")
    if here == there or not {here, there} & set(ASYNCHRONOUS):
        return None
    return f"another update rule: parallel.schedule={there or '1f1b'} there, {here or '1f1b'} here"


def learning_rate_jump(saved: Mapping[str, Any], config: TrainConfig, step: int) -> str | None:
    """Describe the next step's learning rate if the checkpoint's settings would give another one; else return None."""
    known = {field.name for field in dataclasses.fields(OptimizerConfig)}
    try:
        settings = OptimizerConfig(**{k: v for k, v in saved.get("optimizer", {}).items() if k in known})
    except (InputError, TypeError):  # settings of another release
        return None
    num_steps = saved.get("training", {}).get("num_steps", config.training.num_steps)
    before = learning_rate(step, num_steps, settings)
    now = learning_rate(step, config.training.num_steps, config.optimizer)
    if before == now:
        return None
    return f"the learning rate of step {step + 1} is {now:.3g}; with the checkpoint's settings it would be {before:.3g}"


def other_dropout_masks(state: Mapping[str, Any], model_config: TransformerConfig) -> str | None:
    """Describe the random numbers of a checkpoint's release if a resumed run draws others; else return None.

    Args:
        state: of the checkpoint; releases before version 2 did not write a version.
        model_config: of the run.
    """
    version = state.get("dropout_mask", 1)
    if version == MASK_VERSION or not model_config.has_dropout:
        return None
    return (
        f"has dropout masks of version {version}, and this release draws version {MASK_VERSION}: the run goes on with "
        "other masks (resume with the release that wrote it for the same masks)"
    )


def check_same_state(checkpoint: Path, saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise InputError unless a checkpoint has the optimizer state that a run needs.

    Args:
        checkpoint: its folder, for the message.
        saved: the config in the checkpoint; a setting that is missing there had its default value.
        config: of the run.
    """
    theirs = dataclasses.asdict(OptimizerConfig()) | saved.get("optimizer", {})
    for name, ours in (("kind", config.optimizer.kind), ("state_dtype", config.optimizer.state_dtype)):
        check(
            theirs[name] == ours,
            f"{checkpoint} has the optimizer state of another run: optimizer.{name}={theirs[name]!r} there, {ours!r} "
            f"here (set optimizer.{name}={theirs[name]!r}, or choose another training.run_folder)",
        )


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value)


class ResumedTensors:
    """Tensors of a run to be read from a checkpoint, also if one of the two is bfloat16 and the other float32.

    A bfloat16 run and its checkpoints have float32 main weights beside the parameters. Therefore a float32 run reads
    its parameters from the main weights of a bfloat16 checkpoint, and a bfloat16 run reads its main weights from the
    parameters of a float32 checkpoint.

    Args:
        parameters, optimizer: of the run.
        own: the rows of the parameters that the optimizer updates, by name.
        rows: the numbers of these rows.
        manifest: of the checkpoint.

    Attributes:
        boxes: tensors to fill, by their names in the checkpoint.
        allow_extra: patterns of names in the checkpoint that the run does not need.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        own: Mapping[str, torch.Tensor],
        optimizer: Optimizer,
        rows: Rows,
        manifest: Manifest,
    ) -> None:
        self._optimizer = optimizer
        ours = optimizer.state()
        main = {name: {"main": kinds["main"]} for name, kinds in ours.items() if "main" in kinds}
        moments = {name: {k: v for k, v in kinds.items() if k != "main"} for name, kinds in ours.items()}
        weights = parameter_boxes(parameters, own, rows)
        self.boxes: dict[str, TensorBox] = weights | optimizer_boxes(parameters, ours, rows)
        self.allow_extra: Sequence[str] = ()
        self._rounds = False
        stored = {name: tensor.dtype for name, tensor in manifest.tensors.items()}
        has_main = any(name.startswith(_MAIN) for name in stored)
        if has_main and not main:
            renamed = {_MAIN + name.removeprefix(_MODEL): box for name, box in weights.items()}
            self.boxes = renamed | optimizer_boxes(parameters, moments, rows)
            self.allow_extra = (f"{_MODEL}*",)
        elif main and not has_main:
            main_boxes = optimizer_boxes(parameters, main, rows)
            renamed = {_MODEL + name.removeprefix(_MAIN): box for name, box in main_boxes.items()}
            if all(stored.get(name) == torch.float32 for name in weights):
                self.boxes = renamed | optimizer_boxes(parameters, moments, rows)
                self._rounds = True

    def finish(self) -> None:
        """Round this rank's rows of the parameters from the main weights if needed. The boxes must be filled."""
        if self._rounds:
            self._optimizer.round_main_weights()
