"""Data of an imported model that a run does not use (old tensor names, untrained heads), kept for the export."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fused_megatron.checkpoint.shard_file import Entry, write_shard_file
from fused_megatron.checks import InputError
from fused_megatron.hugging_face.source import Source
from fused_megatron.weight_files import SINGLE_FILE, WeightFiles, read_json

_NAMES_FILE = "names.json"
_KEPT_FOLDER = "kept"


@dataclass(frozen=True)
class Leftovers:
    """The original tensor names, and the tensors that are not in our model.

    Attributes:
        prefix: prefix of the tensor names; None: the family's prefix.
        renamed: by today's tensor name, the original name.
        copies: by name of a tensor that was stored twice, the name of the tensor that it equals.
        files: untrained heads and buffers; None if there are none.
    """

    prefix: str | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    files: WeightFiles | None = None


class StreamedTensors(Mapping[Entry, torch.Tensor]):
    """The tensors of one file; each is made when it is read from the mapping."""

    def __init__(self, makers: Mapping[Entry, Callable[[], torch.Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, entry: Entry) -> torch.Tensor:
        return self._makers[entry]()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def kept_tensors(files: WeightFiles, dtype: torch.dtype | None) -> dict[Entry, Callable[[], torch.Tensor]]:
    """Return the tensors and how each is read; floating tensors are converted to dtype unless it is None."""
    makers: dict[Entry, Callable[[], torch.Tensor]] = {}
    for name, stored in files.tensors.items():
        wanted = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
        makers[Entry(name, wanted, stored.shape)] = lambda name=name, wanted=wanted: files.read(name).to(wanted)  # type: ignore[misc]
    return makers


def write_leftovers(source: Source, folder: Path, dtype: torch.dtype | None) -> None:
    """Write the leftovers of an opened folder; read_leftovers reads them."""
    names = {"prefix": source.prefix, "renamed": source.renamed, "copies": source.copies}
    (folder / _NAMES_FILE).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    if source.kept:
        (folder / _KEPT_FOLDER).mkdir()
        makers = {entry: make for entry, make in kept_tensors(source.files, dtype).items() if entry.key in source.kept}
        write_shard_file(folder / _KEPT_FOLDER / SINGLE_FILE, StreamedTensors(makers), 0)


def read_leftovers(folder: Path) -> Leftovers:
    """Read what write_leftovers wrote; empty Leftovers if the folder has none.

    Raises:
        InputError: the file is damaged.
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
