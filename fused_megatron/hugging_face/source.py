"""Opening of a Hugging Face folder: its config.json and tensor headers are checked against each other.

Tensor values are read only to compare tied tensors that are stored twice.
"""

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
# Tensors of a tied head that files may hold, and the tensor that each must equal (None: the embedding).
_TIED = {
    "lm_head.weight": None,
    "cls.predictions.decoder.weight": None,
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
TRAINED_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder whose tensors match its config.json exactly.

    Attributes:
        config: our config of the model.
        files: the tensors.
        rules: by name of our tensor, how it is made from the folder's tensors.
        dtype: dtype of our tensors.
        num_parameters: number of parameters over all ranks.
        prefix: prefix of the folder's tensor names.
        renamed: by today's tensor name, the name in these files.
        copies: by name of a tensor that is stored twice, the name of the tensor that it equals.
        kept: names of tensors that our model does not have.
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
        """Return the shape of one of our full tensors."""
        rule = self.rules[name]
        return rule.full_shape(self.files.tensors[rule.sources[0]].shape)

    def fill(self, name: str, ours: torch.Tensor, offset: Sequence[int]) -> None:
        """Fill `ours` with the block of one of our full tensors that begins at `offset`."""
        self.rules[name].fill(ours, offset, self.files.tensors)

    def read(self, name: str) -> torch.Tensor:
        """Read one of our full tensors, on the CPU."""
        full = torch.empty(self.full_shape(name), dtype=self.dtype)
        self.fill(name, full, (0,) * full.dim())
        return full


def open_source(
    folder: Path, dtype: torch.dtype | None = None, skip: Sequence[str] = (), *, for_run: bool = False
) -> Source:
    """Open and check a Hugging Face folder: config.json and the headers of the safetensors files.

    Args:
        folder: folder as transformers' save_pretrained writes it.
        dtype: dtype of our tensors; None keeps the dtype of the files.
        skip: glob patterns of tensors to leave out.
        for_run: open the model that `train` trains; untrained heads go to `Source.kept`.

    Raises:
        InputError: a file, field or tensor is missing, malformed, damaged, not supported, or does not fit; names it.
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
    # A layer has several tensors. Without this check, a wrong num_layers would first build that many layers.
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
    """Return today's name of a tensor; the first BERT checkpoints name their norms as TensorFlow does."""
    for old, new in ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


class _Names:
    """The folder's tensor names compared with the names that the config wants."""

    def __init__(
        self,
        files: WeightFiles,
        family: Family,
        rules: Sequence[Rule],
        shapes: Mapping[str, tuple[int, ...]],
        skip: Sequence[str],
    ) -> None:
        self._files = files
        self._family = family
        self._embedding = rules[0].sources[0]
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
        """Return stored copies of tied tensors, and the tensor that each equals; raise if a copy differs."""
        if not config.tied_embeddings:
            return {}
        copies = {name: original or self._embedding for name, original in _TIED.items() if name in self._extra}
        for name, original in copies.items():
            self._check_tied(name, original)
        return copies

    def kept(self, copies: Mapping[str, str], for_run: bool) -> tuple[str, ...]:
        """Return the other tensors, which must be buffers or (with for_run) untrained heads; raise for any other."""
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
