"""The command `fused-megatron convert`: models of Hugging Face transformers to run folders, and back."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import InputError, check, check_one_of, dtype_name
from fused_megatron.config import TrainConfig, TransformerConfig
from fused_megatron.hugging_face.export_model import export_model
from fused_megatron.hugging_face.import_model import import_model
from fused_megatron.hugging_face.source import CONFIG_FILE
from fused_megatron.training.config_of_this_machine import config_of_this_machine
from fused_megatron.training.process_group import joined_ranks, on_every_rank, world_group
from fused_megatron.training.progress import Reporter

# Long enough for the slowest file of the largest model. The death of a rank is noticed at once, whatever the timeout.
TIMEOUT_S = 86_400.0
_DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ConvertArguments:
    """Models of Hugging Face transformers to run folders, and back.

    convert from-hf FOLDER RUN: FOLDER holds config.json and safetensors of a GPT-2, Llama, Mistral, Qwen2, Qwen3,
    Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, BERT or Megatron-BERT. The command makes RUN, which `train RUN/config.toml`
    and (except BERT) `generate RUN` read in any layout.

    convert to-hf RUN FOLDER: writes the newest checkpoint of a run, imported or trained here, in the format of
    transformers.

    convert hf SOURCE TARGET: one of the two, by the kind of SOURCE.
    """

    direction: tyro.conf.Positional[Literal["from-hf", "to-hf", "hf"]]
    """from-hf, to-hf, or hf (by the kind of SOURCE)."""
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder of a transformers model (from-hf), or run folder (to-hf)."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """Folder to make; it must not exist."""
    dtype: str = "keep"
    """Dtype of the new weights: keep (bit for bit), float32, bfloat16, or (to-hf) float16."""
    skip: str = ""
    """from-hf: tensors to leave out, as comma-separated patterns (score.*)."""
    max_file_gb: float = 5.0
    """to-hf: largest size of a safetensors file, in GB of 10^9 bytes."""

    def __post_init__(self) -> None:
        check_one_of("dtype", self.dtype, list(_DTYPES))
        check(self.max_file_gb > 0, f"max_file_gb={self.max_file_gb} must be above 0")


def convert(arguments: ConvertArguments) -> None:
    """Convert a model. Every rank must call this.

    Raises:
        InputError, CheckpointError: on every rank; no partial result is left behind.
    """
    with joined_ranks(TIMEOUT_S) as this_rank:
        reporter = Reporter(this_rank.rank == 0, 1)
        if on_every_rank(lambda: _is_import(arguments)):
            _import(arguments, reporter)
        else:
            _export(arguments, reporter)


def _is_import(arguments: ConvertArguments) -> bool:
    if arguments.direction != "hf":
        return arguments.direction == "from-hf"
    run = RunFolder(arguments.source).config
    importable, exportable = (arguments.source / CONFIG_FILE).is_file(), run.is_file()
    check(
        importable or exportable,
        f"{arguments.source} is neither a folder of transformers' (no {CONFIG_FILE}) nor a run (no {run.name})",
    )
    return importable


def _import(arguments: ConvertArguments, reporter: Reporter) -> None:
    dtype = _DTYPES[arguments.dtype]
    on_every_rank(
        lambda: check(dtype != torch.float16, "dtype='float16' is not trained here: give float32 or bfloat16")
    )
    skip = [pattern for pattern in arguments.skip.split(",") if pattern]
    reasons: list[str] = []

    def start(config: TrainConfig) -> TrainConfig:
        found, reason = config_of_this_machine(config)
        reasons.append(reason)
        return found

    source = import_model(arguments.source, arguments.target, dtype=dtype, skip=skip, group=world_group(), start=start)
    target, config = arguments.target, source.config
    reporter.say(
        f"{target}: {source.num_parameters:,} parameters in {dtype_name(source.dtype)}"
        + (f"; kept for to-hf, but not used by the run: {', '.join(source.kept)}" if source.kept else "")
    )
    if any(reasons):
        reporter.say(f"config.toml: {reasons[0]}")
    commands = [f'fused-megatron generate {target} "..."'] if config.traits.generates else []
    if _is_trainable(config):
        commands.append(f"fused-megatron train {os.path.join(target, 'config.toml')} --data.path TEXT")
    if commands:
        reporter.say(f"next: {' or '.join(commands)}")


def _is_trainable(config: TransformerConfig) -> bool:
    try:
        config.check_trainable()
    except InputError:
        return False
    return True


def _export(arguments: ConvertArguments, reporter: Reporter) -> None:
    architecture = export_model(
        arguments.source,
        arguments.target,
        dtype=_DTYPES[arguments.dtype],
        max_file_bytes=1e9 * arguments.max_file_gb,
        group=world_group(),
    )
    reporter.say(f'{arguments.target}: transformers.{architecture}.from_pretrained("{arguments.target}") loads it')
