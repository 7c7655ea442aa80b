"""State of a run in its checkpoints: progress, vocabulary size and config, validated when read.

A checkpoint may come from anybody, so no field is trusted.
"""

import dataclasses
import typing
from pathlib import Path
from typing import Annotated, Any

import msgspec

from fused_megatron.checkpoint.errors import CheckpointError
from fused_megatron.checkpoint.manifest import Manifest, read_manifest
from fused_megatron.checks import InputError
from fused_megatron.config import MODEL_FAMILIES, TrainConfig
from fused_megatron.untrusted_files import Size, convert


class _Progress(msgspec.Struct, forbid_unknown_fields=True):
    step: Size
    samples_consumed: Size


class _State(msgspec.Struct):
    progress: _Progress
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    config: dict[str, dict[str, Any]]
    weights_only: bool = False
    dropout_mask: Size = 1


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state of a run from a checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or holds no state of a run.
    """
    return run_state(checkpoint, read_manifest(checkpoint))


def run_state(checkpoint: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the state of a run from a manifest, validated.

    It has the keys "progress", "vocab_size" and "config". The config has the sections of a TrainConfig; all fields that
    this release knows have the right types.

    Raises:
        CheckpointError: the manifest holds no state of a run.
    """
    try:
        config = convert(manifest.state, _State).config
        if "model" not in config:
            raise InputError("no config.model")
        family = config["model"].get("family", "gpt")
        known = MODEL_FAMILIES.get(family) if isinstance(family, str) else None
        if known is None:
            raise InputError(f"config.model.family={family!r:.40} must be one of: {', '.join(MODEL_FAMILIES)}")
        sections = typing.get_type_hints(TrainConfig) | {"model": known.config}
        for section, values in config.items():
            if section in sections:
                _check_fields(section, values, sections[section])
    except InputError as error:
        raise CheckpointError(
            f"{checkpoint}: malformed: its state is not that of a run: {error} (take another checkpoint, or another "
            "run folder)"
        ) from None
    return manifest.state


def _check_fields(section: str, values: dict[str, Any], cls: type) -> None:
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in values:
            try:
                convert(values[field.name], types[field.name])
            except InputError as error:
                raise InputError(f"config.{section}.{field.name}: {error}") from None
    if section == "training" and values.get("num_steps", 1) < 1:
        raise InputError(f"config.training.num_steps={values['num_steps']} must be 1 or more")
