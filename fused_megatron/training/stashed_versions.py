"""Older versions of the weights in a checkpoint, which asynchronous pipeline schedules read after a resume."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_megatron.assembly.assemble import Assembly
from fused_megatron.checkpoint import Manifest, TensorBox
from fused_megatron.checkpoint.model_state import optimizer_boxes
from fused_megatron.checks import check
from fused_megatron.config import ParallelConfig

ANY = "optimizer.stashed_*"
"""Pattern of the names of older versions."""


def stash_boxes(assembly: Assembly) -> dict[str, TensorBox]:
    """Return the older versions that this rank keeps, under `optimizer.stashed_<updates>.<name>`."""
    boxes: dict[str, TensorBox] = {}
    for stage, parameters in _stages(assembly):
        boxes |= _boxes(parameters, assembly.executor.stashed[stage].older())
    return boxes


def stash_boxes_to_fill(
    assembly: Assembly, checkpoint: Path, manifest: Manifest, saved: Mapping[str, Any]
) -> dict[str, TensorBox]:
    """Make the older versions that a checkpoint has for this rank's stages, and return them to be filled.

    Versions of pipedream_2bw are equally old on all stages, and so fit any pipeline. A checkpoint of a synchronous
    schedule has none: then the first microbatches use the newest weights, as at the start of a training.

    Args:
        assembly: of this rank.
        checkpoint: its folder, for the message.
        manifest: of the checkpoint.
        saved: the config in the checkpoint.

    Raises:
        InputError: the checkpoint has versions of another schedule, or of pipedream with other stages.
    """
    ours, theirs = assembly.config.parallel, dict(saved.get("parallel", {}))
    has_versions = any(name.startswith(ANY[:-1]) for name in manifest.tensors)
    if not assembly.executor.stashed or not has_versions:
        return {}
    fields = ["schedule"] + ["pipeline_parallel_size", "pipeline_cut"] * (ours.schedule == "pipedream")
    for field in fields:
        there, here = theirs.get(field, getattr(ParallelConfig(), field)), getattr(ours, field)
        there, here = (tuple(each) if isinstance(each, list) else each for each in (there, here))
        check(
            there == here,
            f"{checkpoint} has older weights of another pipeline: parallel.{field}={there} there, {here} here (resume "
            f"with parallel.{field}={there}, or with a synchronous schedule, which leaves them out)",
        )
    boxes: dict[str, TensorBox] = {}
    for stage, parameters in _stages(assembly):
        number = 0
        while all(name in manifest.tensors for name in _boxes(parameters, [{}] * number + [_whole(parameters)])):
            number += 1
        boxes |= _boxes(parameters, assembly.executor.stashed[stage].make_older(number))
    return boxes


def _stages(assembly: Assembly) -> Iterator[tuple[int, dict[str, nn.Parameter]]]:
    for stage in assembly.executor.stashed:
        names = dict(assembly.model.stages[stage].named_parameters())
        yield stage, {name: p for name, p in names.items() if p.requires_grad}


def _whole(parameters: Mapping[str, nn.Parameter]) -> dict[nn.Parameter, torch.Tensor]:
    return {p: p.detach() for p in parameters.values()}


def _boxes(
    parameters: Mapping[str, nn.Parameter], older: Sequence[Mapping[nn.Parameter, torch.Tensor]]
) -> dict[str, TensorBox]:
    """Return the boxes of whole versions of a stage's parameters; the first is one update old."""
    boxes: dict[str, TensorBox] = {}
    for age, version in enumerate(older, 1):
        kept = {name: {f"stashed_{age}": version[p]} for name, p in parameters.items() if p in version}
        boxes |= optimizer_boxes(parameters, kept)
    return boxes
