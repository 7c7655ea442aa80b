"""What an imported model has beyond the weights of a run, kept beside the run for the way back."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fused_megatron.checkpoint.shard_file import Entry, write_shard_file
from fused_megatron.checks import InputError
from fused_megatron.hugging_face.source import Source
from fused_megatron.weight_files import SINGLE_FILE, WeightFiles, read_json

_NAMES_FILE, _KEPT_FOLDER = "names.json", "kept"


@dataclass(frozen=True)
class Leftovers:
    """Names as they were, and tensors that have no place in the model.

    Attributes:
        prefix: of the names; None: the family's.
        renamed: today's names, and what they were.
        copies: what was stored a second time, and the tensor that it equals.
        files: heads that are not trained, and buffers; None where there are none.
    """

    prefix: str | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    files: WeightFiles | None = None


class StreamedTensors(Mapping[Entry, torch.Tensor]):
    """The tensors of one file, each made when it is asked for."""

    def __init__(self, made: Mapping[Entry, Callable[[], torch.Tensor]]) -> None:
        self._made = made

    def __getitem__(self, entry: Entry) -> torch.Tensor:
        return self._made[entry]()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def kept_tensors(files: WeightFiles, dtype: torch.dtype | None) -> dict[Entry, Callable[[], torch.Tensor]]:
    """How each tensor is read; floating ones converted to dtype, where it is given."""
    made: dict[Entry, Callable[[], torch.Tensor]] = {}
    for name, stored in files.tensors.items():
        wanted = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
        made[Entry(name, wanted, stored.shape)] = lambda name=name, wanted=wanted: files.read(name).to(wanted)  # type: ignore[misc]
    return made


def write_leftovers(source: Source, folder: Path, dtype: torch.dtype | None) -> None:
    """Write what read_leftovers reads."""
    names = {"prefix": source.prefix, "renamed": source.renamed, "copies": source.copies}
    (folder / _NAMES_FILE).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    if source.kept:
        (folder / _KEPT_FOLDER).mkdir()
        made = {entry: read for entry, read in kept_tensors(source.files, dtype).items() if entry.key in source.kept}
        write_shard_file(folder / _KEPT_FOLDER / SINGLE_FILE, StreamedTensors(made), 0)


def read_leftovers(folder: Path) -> Leftovers:
    """What write_leftovers wrote; nothing where there is none.

    Raises:
        InputError: a damaged file.
    """
    if not (folder / _NAMES_FILE).is_file():
        return Leftovers()
    names = read_json(folder / _NAMES_FILE)
    try:
        found = Leftovers(str(names["prefix"]), dict(names["renamed"]), dict(names["copies"]))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{folder / _NAMES_FILE} is damaged: import the model again, or remove the file") from None
    kept = folder / _KEPT_FOLDER
    return replace(found, files=WeightFiles(kept)) if kept.is_dir() else found
