"""A folder of transformers', opened: config.json and its tensors, which must belong together; no numbers are read."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fused_megatron.checkpoint.model_state import parameter_boxes
from fused_megatron.checks import InputError, check, dtype_name
from fused_megatron.config import TransformerConfig
from fused_megatron.hugging_face.family_description import Family, is_buffer
from fused_megatron.hugging_face.known_families import family_of
from fused_megatron.hugging_face.rules import Rule
from fused_megatron.hugging_face.settings import Settings
from fused_megatron.models import new_model
from fused_megatron.weight_files import WeightFiles, read_json

CONFIG_FILE = "config.json"
# What of a tied head may be stored twice, and what it then equals (None: the embedding).
_TIED = {
    "lm_head.weight": None,
    "cls.predictions.decoder.weight": None,
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
TRAINED_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Source:
    """A folder of transformers', checked: its tensors are those of its config, no more and no fewer.

    Attributes:
        config: the model here.
        files: the tensors.
        rules: which of theirs make each of ours, by our name.
        dtype: of ours.
        num_parameters: over all ranks.
        prefix: of the names of theirs.
        renamed: today's names of theirs, and what they are in these files.
        copies: what is stored a second time, and the tensor that it equals.
        kept: what has no place in the model.
    """

    config: TransformerConfig
    files: WeightFiles
    rules: dict[str, Rule]
    dtype: torch.dtype
    num_parameters: int
    prefix: str
    renamed: dict[str, str]
    copies: dict[str, str]
    kept: tuple[str, ...]

    def full_shape(self, name: str) -> tuple[int, ...]:
        """Of one of our tensors."""
        rule = self.rules[name]
        return rule.full_shape(self.files.tensors[rule.sources[0]].shape)

    def fill(self, name: str, ours: torch.Tensor, offset: Sequence[int]) -> None:
        """Read what lies at offset of one of our full tensors, in the shape of `ours`, into it."""
        self.rules[name].fill(ours, offset, self.files.tensors)

    def read(self, name: str) -> torch.Tensor:
        """One of our full tensors, on the CPU."""
        full = torch.empty(self.full_shape(name), dtype=self.dtype)
        self.fill(name, full, (0,) * full.dim())
        return full


def open_source(
    folder: Path, dtype: torch.dtype | None = None, skip: Sequence[str] = (), *, for_run: bool = False
) -> Source:
    """Read config.json and the headers of the safetensors files; no numbers.

    Args:
        folder: as transformers' save_pretrained writes it.
        dtype: convert to it; None keeps that of the files.
        skip: glob patterns of tensors to leave out.
        for_run: the model that is trained: heads that are not are kept as they are (`Source.kept`).

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
    config = config.trainable() if for_run else config
    files = WeightFiles(folder)
    # A layer has several tensors; without this a wrong number would build that many layers first.
    check(
        config.num_layers <= len(files.tensors),
        f"{folder}: {len(files.tensors)} tensors are too few for num_layers={config.num_layers} of {CONFIG_FILE}: "
        f"is a file missing, or {CONFIG_FILE} of another model?",
    )
    model = new_model(config, device=torch.device("meta"))
    shapes = {
        name.removeprefix("model."): box.full_shape
        for name, box in parameter_boxes(dict(model.named_parameters())).items()
    }
    prefix = family.prefix_in(files.tensors)
    renamed = {new: old for old in files.tensors if (new := _present_name(old)) not in files.tensors}
    rules = {rule.name: rule.with_names(renamed) for rule in family.rules(config, prefix)}
    assert rules.keys() == shapes.keys()
    names = _Names(files, family, list(rules.values()), shapes, skip)
    copies = names.copies(config)
    kept = names.kept(copies, for_run)
    for rule in rules.values():
        _check_shapes(files, rule, shapes[rule.name])
    dtype = _common_dtype(files, list(rules.values()), dtype)
    return Source(config, files, rules, dtype, model.num_parameters(), prefix, renamed, copies, kept)


def _present_name(name: str) -> str:
    """What transformers calls a tensor today; the first BERTs have the names of TensorFlow's norms."""
    for old, new in ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


class _Names:
    """The names of a folder's tensors beside those that are wanted."""

    def __init__(
        self, files: WeightFiles, family: Family, rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]],
        skip: Sequence[str],
    ) -> None:  # fmt: skip
        self._files, self._family, self._embedding = files, family, rules[0].sources[0]
        wanted = {source: rule.source_shape(shapes[rule.name]) for rule in rules for source in rule.sources}
        found = {name for name in files.tensors if not _matches(name, skip)}
        if missing := [name for name in wanted if name not in found]:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise InputError(
                f"{files.folder}: tensor {missing[0]!r} of shape {wanted[missing[0]]} is wanted by {CONFIG_FILE} and "
                f"not there{more}: is a file missing, or {CONFIG_FILE} of another model?"
            )
        self._extra = sorted(found - wanted.keys())

    def copies(self, config: TransformerConfig) -> dict[str, str]:
        """What of a tied head is stored too, which it may be where it is the same."""
        if not config.tied_embeddings:
            return {}
        copies = {name: original or self._embedding for name, original in _TIED.items() if name in self._extra}
        for name, original in copies.items():
            self._check_tied(name, original)
        return copies

    def kept(self, copies: Mapping[str, str], for_run: bool) -> tuple[str, ...]:
        """What is neither wanted nor a copy: buffers, and heads that are not trained; anything else is refused."""
        left = [name for name in self._extra if name not in copies]
        kept = [name for name in left if is_buffer(name) or (for_run and _matches(name, self._family.untrained))]
        if extra := [name for name in left if name not in kept]:
            more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise InputError(
                f"{self._files.folder}: tensor {extra[0]!r} of shape {self._files.tensors[extra[0]].shape} is there, "
                f"but {self._family.architecture} has none of this name{more}: leave it out with --skip '{extra[0]}' "
                f"(a pattern will do)"
            )
        return tuple(kept)

    def _check_tied(self, copy: str, original: str) -> None:
        check(
            self._files.same(copy, original),
            f"{self._files.folder}: tensor {copy!r} differs from {original!r}, but tie_word_embeddings says that they "
            f"are one: set tie_word_embeddings to false in {CONFIG_FILE}, or leave the head out with --skip {copy}",
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


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
        name = dtype_name(found)
        check(
            found in TRAINED_DTYPES,
            f"{files.tensors[source].path}: tensor {source!r} is {name}, which is not trained here: give --dtype "
            f"float32 (keeps every value) or --dtype bfloat16",
        )
        check(
            found == first,
            f"{files.tensors[source].path}: tensor {source!r} is {name} where {sources[0]!r} is "
            f"{dtype_name(first)}: give --dtype float32 (keeps every value) or --dtype bfloat16",
        )
    return first
