"""From a folder of transformers' to a run, or straight into a model's shards; one tensor at a time."""

import dataclasses
import fnmatch
import functools
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fused_megatron.checks import InputError, check
from fused_megatron.config import BERTConfig, DataConfig, GPTConfig, OptimizerConfig, TrainConfig, TrainingConfig
from fused_megatron.models import BERT, GPT, cut_stages
from fused_megatron.training.checkpoint import StreamedBox, TensorBox, save_checkpoint
from fused_megatron.training.checkpoint.ranks import run_on_first, run_together
from fused_megatron.training.hugging_face.families import family_of
from fused_megatron.training.hugging_face.family import is_buffer
from fused_megatron.training.hugging_face.rules import Rule
from fused_megatron.training.hugging_face.settings import Settings
from fused_megatron.training.model_state import parameter_boxes
from fused_megatron.training.run_folder import RunFolder
from fused_megatron.weight_files import WeightFiles, read_json

CONFIG_FILE = "config.json"
# Small files beside the weights, kept so that the way back has them.
KEPT_FILES = (
    CONFIG_FILE, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
# What of a tied head may be stored twice, and what it then equals (None: the embedding).
_TIED = {
    "lm_head.weight": None,
    "cls.predictions.decoder.weight": None,
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_TRAINED = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Source:
    """A folder of transformers', checked: its tensors are those of its config, no more and no fewer.

    Attributes:
        config: the model here.
        files: the tensors.
        rules: which of theirs make each of ours, by our name.
        dtype: of ours.
        num_parameters: over all ranks.
    """

    config: GPTConfig
    files: WeightFiles
    rules: dict[str, Rule]
    dtype: torch.dtype
    num_parameters: int

    def read(self, name: str) -> torch.Tensor:
        """One of our full tensors, on the CPU."""
        rule = self.rules[name]
        return rule.to_ours([self.files.read(source) for source in rule.sources]).to(self.dtype)


def open_source(folder: Path, dtype: torch.dtype | None = None, skip: Sequence[str] = ()) -> Source:
    """Read config.json and the headers of the safetensors files; no numbers.

    Args:
        folder: as transformers' save_pretrained writes it.
        dtype: convert to it; None keeps that of the files.
        skip: glob patterns of tensors to leave out.

    Raises:
        InputError: something is missing, malformed, damaged, not supported, or does not fit; it is named.
    """
    check(folder.is_dir(), f"{folder} is no folder")
    check(
        (folder / CONFIG_FILE).is_file(),
        f"{folder} has no {CONFIG_FILE}: it must be a folder as transformers' model.save_pretrained(folder) writes it",
    )
    settings = Settings(read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    family = family_of(settings)
    config = family.read_config(settings)
    files = WeightFiles(folder)
    model = _new_model(config, device=torch.device("meta"))
    shapes = {
        name.removeprefix("model."): box.full_shape
        for name, box in parameter_boxes(dict(model.named_parameters())).items()
    }
    rules = {rule.name: rule for rule in family.rules(config, family.prefix_in(files.tensors))}
    assert rules.keys() == shapes.keys()
    _check_names(files, list(rules.values()), shapes, config, family.architecture, skip)
    for rule in rules.values():
        _check_shapes(files, rule, shapes[rule.name])
    return Source(config, files, rules, _common_dtype(files, list(rules.values()), dtype), model.num_parameters())


def _check_names(
    files: WeightFiles, rules: Sequence[Rule], shapes: dict[str, tuple[int, ...]], config: GPTConfig, architecture: str,
    skip: Sequence[str],
) -> None:  # fmt: skip
    wanted = {source: rule.source_shape(shapes[rule.name]) for rule in rules for source in rule.sources}
    found = {
        name for name in files.tensors if not is_buffer(name) and not any(fnmatch.fnmatchcase(name, p) for p in skip)
    }
    if missing := [name for name in wanted if name not in found]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(
            f"{files.folder}: tensor {missing[0]!r} of shape {wanted[missing[0]]} is wanted by {CONFIG_FILE} and not "
            f"there{more}: is a file missing, or {CONFIG_FILE} of another model?"
        )
    extra = sorted(found - wanted.keys())
    for copy, original in _TIED.items():
        if copy in extra and config.tied_embeddings:
            _check_tied(files, copy, original or rules[0].sources[0])
            extra.remove(copy)
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise InputError(
            f"{files.folder}: tensor {extra[0]!r} of shape {files.tensors[extra[0]].shape} is there, but "
            f"{architecture} has none of this name{more}: leave it out with --skip '{extra[0]}' (a pattern will do)"
        )


def _check_tied(files: WeightFiles, copy: str, original: str) -> None:
    """A head that is tied may be stored too, where it is the same."""
    check(
        files.same(copy, original),
        f"{files.folder}: tensor {copy!r} differs from {original!r}, but tie_word_embeddings says that they are one: "
        f"set tie_word_embeddings to false in {CONFIG_FILE}, or leave the head out with --skip {copy}",
    )


def _check_shapes(files: WeightFiles, rule: Rule, shape: tuple[int, ...]) -> None:
    for source in rule.sources:
        found, wanted = files.tensors[source].shape, rule.source_shape(shape)
        check(
            found == wanted,
            f"{files.tensors[source].path}: tensor {source!r} has shape {found}, but {wanted} by {CONFIG_FILE}: it is "
            f"of another model (copy both from one place)",
        )


def _common_dtype(files: WeightFiles, rules: Sequence[Rule], dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    sources = [source for rule in rules for source in rule.sources]
    first = files.tensors[sources[0]].dtype
    for source in sources:
        found = files.tensors[source].dtype
        name = str(found).removeprefix("torch.")
        check(
            found in _TRAINED,
            f"{files.tensors[source].path}: tensor {source!r} is {name}, which is not trained here: give --dtype "
            f"float32 (keeps every value) or --dtype bfloat16",
        )
        check(
            found == first,
            f"{files.tensors[source].path}: tensor {source!r} is {name} where {sources[0]!r} is "
            f"{str(first).removeprefix('torch.')}: give --dtype float32 (keeps every value) or --dtype bfloat16",
        )
    return first


def load_model(
    folder: str | os.PathLike[str],
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    stage: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    skip: Sequence[str] = (),
) -> GPT | BERT:
    """A GPT or BERT with the weights of a folder of transformers', at any tensor-parallel size, or a stage of a GPT.

    Args:
        folder: config.json and safetensors, whole or in several files.
        tp_group: tensor-parallel group; None means one rank.
        sequence_parallel: as GPT.
        stage: (index, number of stages): that pipeline stage alone, as cut_stages cuts it.
        dtype: of the model; None keeps that of the files.
        device: of the model; None is the CPU.
        skip: glob patterns of tensors to leave out.

    Raises:
        InputError: on every rank, for what open_source refuses, and sizes that do not divide.

    Communication: one exchange of JSON.
    Memory: this rank's shard and one full tensor.
    """
    built: list[GPT | BERT] = []

    def build() -> None:
        source = open_source(Path(folder), dtype, skip)
        part: dict[str, Any] = {}
        if stage is not None:
            check(not isinstance(source.config, BERTConfig), f"stage={stage} must be None: a BERT has no stages")
            part["stage"] = cut_stages(source.config, stage[1])[stage[0]]
        model = _new_model(
            source.config, tp_group=tp_group, sequence_parallel=sequence_parallel, dtype=source.dtype,
            device=torch.device("meta"), **part,
        )  # fmt: skip
        built.append(_filled(model, source, device or torch.device("cpu")))

    run_together(tp_group, build)
    return built[0]


def _new_model(config: GPTConfig, **layout: Any) -> GPT | BERT:
    return BERT(config, **layout) if isinstance(config, BERTConfig) else GPT(config, **layout)


def _filled(model: GPT | BERT, source: Source, device: torch.device) -> GPT | BERT:
    model = model.to_empty(device=device)
    model.reset_dropout(seed=0)
    for parameter in model.parameters():
        parameter.data.zero_()  # rows that pad the vocabulary
    for name, box in parameter_boxes(dict(model.named_parameters())).items():
        _copy_box(source.read(name.removeprefix("model.")), box)
    return model


def _copy_box(full: torch.Tensor, box: TensorBox) -> None:
    """A function, so that nothing holds the full tensor when the next is read."""
    box.tensor.copy_(full[box.box.slices((0,) * full.dim())])


def import_model(
    folder: Path, run_path: Path, *, dtype: torch.dtype | None, skip: Sequence[str], group: dist.ProcessGroup | None
) -> Source:
    """Make a run of a folder of transformers': a checkpoint of step 0 that holds the weights alone, and a config.

    Args:
        folder: config.json and safetensors.
        run_path: made; must not exist.
        dtype: float32 or bfloat16; None keeps that of the files.
        skip: glob patterns of tensors to leave out.
        group: all ranks, which share the work; None when there is one.

    Raises:
        InputError, CheckpointError: on every rank; nothing is left behind.

    Communication: that of save_checkpoint.
    Memory: one full tensor (two of the fused query, key and value).
    """
    opened: list[Source] = []

    def prepare() -> None:
        check_absent(run_path)
        source = open_source(folder, dtype, skip)
        check(
            not isinstance(source.config, BERTConfig),
            f"{folder} holds a BERT, of which there are no runs: `train` and `generate` are for GPTs "
            f"(fused_megatron.training.hugging_face.load_model takes it)",
        )
        opened.append(source)

    run_together(group, prepare)
    source = opened[0]
    boxes: dict[str, TensorBox] = {}
    for name, rule in source.rules.items():
        like = torch.empty(_full_shape(source, rule), dtype=source.dtype, device="meta")
        read = functools.partial(source.read, name)
        boxes[f"model.{name}"] = StreamedBox(like, tuple(like.shape), (0,) * like.dim(), read)
    config = _run_config(source, folder, run_path)
    state = {
        "progress": {"step": 0, "samples_consumed": 0},
        "vocab_size": source.config.vocab_size,
        "config": dataclasses.asdict(config),
        "weights_only": True,
    }
    with new_folder(run_path, group) as temporary:
        run = RunFolder(temporary)
        run_on_first(group, run.create)
        save_checkpoint(run.checkpoints, 0, boxes, state=state, group=group)
        run_on_first(group, lambda: _describe_run(run, config, folder))
    return source


def _full_shape(source: Source, rule: Rule) -> tuple[int, ...]:
    shape = source.files.tensors[rule.sources[0]].shape
    first, *rest = shape[::-1] if rule.transposed else shape
    return (first * len(rule.sources), *rest)


def _run_config(source: Source, folder: Path, run_path: Path) -> TrainConfig:
    """How training goes on from the weights: gently, and in the run's own folder."""
    tokenizer = run_path.absolute() / RunFolder(run_path).tokenizer.name
    return TrainConfig(
        model=source.config,
        data=DataConfig(tokenizer_path=str(tokenizer) if (folder / tokenizer.name).is_file() else None),
        optimizer=OptimizerConfig(lr=2e-5, min_lr=2e-6),
        training=TrainingConfig(
            dtype=_TRAINED[source.dtype], run_folder=str(run_path.absolute()), global_batch_size=8, microbatch_size=1
        ),
    )


def _describe_run(run: RunFolder, config: TrainConfig, folder: Path) -> None:
    tokenizer = folder / run.tokenizer.name
    run.describe(config, str(tokenizer) if tokenizer.is_file() else None)
    copy_kept_files(folder, run.hugging_face)


def copy_kept_files(source: Path, target: Path) -> None:
    """Copy the small files that are there."""
    target.mkdir(exist_ok=True)
    for name in KEPT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def check_absent(target: Path) -> None:
    """Raise unless nothing is at target, and something can be made there."""
    check(not target.exists(), f"{target} exists already: choose another name, or remove it first")
    parent = target.absolute().parent
    check(
        not parent.exists() or (parent.is_dir() and os.access(parent, os.W_OK)),
        f"{target} cannot be made: {parent} cannot be written (choose another place)",
    )


@contextmanager
def new_folder(target: Path, group: dist.ProcessGroup | None) -> Iterator[Path]:
    """A folder that gets the name `target` once the block is done, and is removed where it fails."""
    temporary = target.with_name(run_on_first(group, lambda: _begin(target)))
    try:
        yield temporary
        run_on_first(group, lambda: os.rename(temporary, target))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _begin(target: Path) -> str:
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.iterdir():
        if re.fullmatch(re.escape(target.name) + r"\.tmp-[0-9a-f]{8}", left.name):
            shutil.rmtree(left, ignore_errors=True)  # of one that was killed
    temporary = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
    temporary.mkdir()
    return temporary.name
