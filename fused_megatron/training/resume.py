"""Differences between a checkpoint and the run that goes on from it, and its weights in another dtype."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fused_megatron.checkpoint import Manifest, TensorBox
from fused_megatron.checkpoint.model_state import optimizer_boxes, parameter_boxes
from fused_megatron.checks import InputError
from fused_megatron.config import OptimizerConfig, TrainConfig
from fused_megatron.data_parallel.optimizer import Optimizer
from fused_megatron.training.learning_rate import learning_rate

# Where a run writes, what it shows, and how it is laid out change no number that is learnt.
_WITHOUT_EFFECT = {
    "parallel": None,
    "data": {"cache_folder"},
    "training": {
        *{"run_folder", "microbatch_size", "bucket_mb", "eval_interval", "eval_batches", "log_interval"},
        *{"checkpoint_interval", "keep_checkpoints", "tensorboard", "replica_check_interval"},
    },
}
_MODEL, _MAIN = "model.", "optimizer.main."


def settings_that_differ(saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Every setting that changes what is learnt and is not what the checkpoint was trained with, a line each.

    Args:
        saved: the config in a checkpoint; a setting that it does not know had its default value.
        config: of the run that goes on from it.
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
            # What the data gave where the config left it open.
            if name in free or there == value or (name == "vocab_size" and None in (there, value)):
                continue
            lines.append(f"{section.name}.{name}={_shown(there)} there, {_shown(value)} here")
    return lines


def learning_rate_jump(saved: Mapping[str, Any], config: TrainConfig, step: int) -> str | None:
    """The next step's learning rate, where the checkpoint's settings would give another; None where they would not."""
    known = {field.name for field in dataclasses.fields(OptimizerConfig)}
    try:
        settings = OptimizerConfig(**{k: v for k, v in saved.get("optimizer", {}).items() if k in known})
    except (InputError, TypeError):  # of another release
        return None
    num_steps = saved.get("training", {}).get("num_steps", config.training.num_steps)
    before = learning_rate(step, num_steps, settings)
    now = learning_rate(step, config.training.num_steps, config.optimizer)
    if before == now:
        return None
    return f"the learning rate of step {step + 1} is {now:.3g}; with the checkpoint's settings it would be {before:.3g}"


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value)


class ResumedTensors:
    """The boxes that a run takes from a checkpoint, also where one of the two is bfloat16 and the other float32.

    A bfloat16 run has float32 main weights beside its parameters, and so has its checkpoint. So a float32 run takes
    those for its parameters, and a bfloat16 run takes a float32 checkpoint's parameters for its main weights.

    Args:
        parameters, optimizer: of the run.
        manifest: of the checkpoint.

    Attributes:
        boxes: to be filled.
        allow_extra: names in the checkpoint that the run has no use for.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, manifest: Manifest) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        ours = optimizer.state()
        main = {name: {"main": kinds["main"]} for name, kinds in ours.items() if "main" in kinds}
        moments = {name: {k: v for k, v in kinds.items() if k != "main"} for name, kinds in ours.items()}
        self.boxes: dict[str, TensorBox] = parameter_boxes(parameters) | optimizer_boxes(parameters, ours)
        self.allow_extra: Sequence[str] = ()
        self._rounds = False
        stored = {name: tensor.dtype for name, tensor in manifest.tensors.items()}
        has_main = any(name.startswith(_MAIN) for name in stored)
        if has_main and not main:
            weights = parameter_boxes(parameters)
            renamed = {_MAIN + name.removeprefix(_MODEL): box for name, box in weights.items()}
            self.boxes = renamed | optimizer_boxes(parameters, moments)
            self.allow_extra = (f"{_MODEL}*",)
        elif main and not has_main:
            weights = optimizer_boxes(parameters, main)
            renamed = {_MODEL + name.removeprefix(_MAIN): box for name, box in weights.items()}
            if all(stored.get(name) == torch.float32 for name in renamed):
                self.boxes = parameter_boxes(parameters) | renamed | optimizer_boxes(parameters, moments)
                self._rounds = True

    def finish(self) -> None:
        """After the boxes are filled: parameters that are rounded from main weights."""
        if self._rounds:
            for name, main in self._optimizer.main.items():
                self._parameters[name].detach().copy_(main)
