"""Loading of a checkpoint into tensors of any layout.

A rank reads every stored box that overlaps a box that it wants, and verifies its checksum.
"""

import fnmatch
import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fused_megatron.checkpoint.errors import CheckpointError, SharedCheckpointError
from fused_megatron.checkpoint.manifest import (
    RANK_TENSOR_PREFIX,
    Manifest,
    StoredTensor,
    read_manifest_and_digest,
)
from fused_megatron.checkpoint.shard_file import ConsumeRows, ShardFileReader
from fused_megatron.checks import InputError, check, dtype_name
from fused_megatron.collectives.groups import group_rank, group_size
from fused_megatron.collectives.together import run_together
from fused_megatron.sharding.box import Box, TensorBox

_WAY_OUT = "is it the checkpoint of another model? (use the config saved with it, or another run folder)"


def load_checkpoint(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorBox],
    *,
    rank_tensors: Mapping[str, torch.Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
) -> dict[str, Any]:
    """Fill this rank's tensors, in place, from the checkpoint at path, which may have been saved in any layout.

    The checksum of all used data is verified, but some data is copied before. After an error the tensors therefore hold
    undefined values. Nothing in a checkpoint is executed, and no file outside its folder is opened.

    Args:
        path: a checkpoint's folder, as returned by `newest_checkpoint`.
        tensors: by name, the box of the full tensor that this rank wants; its tensor is written. Shapes and dtypes
            must equal the checkpoint's.
        rank_tensors: destinations for the tensors that the rank of the same number gave to `save_checkpoint`. If the
            number of ranks differs, they are left as they are, with a warning.
        group: all ranks of the run; None: one rank.
        allow_missing: glob patterns of names that the checkpoint may lack; those tensors are left as they are.
        allow_extra: glob patterns of names in the checkpoint that no rank needs to ask for.

    Returns:
        The state that was given to save_checkpoint.

    Raises:
        InputError: on every rank, if the checkpoint does not fit (names, shapes, dtypes), for example of another model.
        CheckpointError: on every rank, if the checkpoint is damaged; the message names the file and the tensor.

    Communication: two exchanges of JSON. Each rank reads the files itself.
    Memory: one block of 4 MiB, or one row, beside the destinations.
    """
    rank, world_size = group_rank(group), group_size(group)
    path = Path(path)
    manifests: list[Manifest] = []  # filled by open_and_check: ranks exchange only the digest and the names they want

    def open_and_check() -> list[Any]:
        manifest, digest = read_manifest_and_digest(path)
        manifests.append(manifest)
        _check_fit(path, manifest, tensors, allow_missing)
        if manifest.world_size == world_size:
            _check_rank_tensors(path, manifest.rank_tensors.get(rank, {}), rank_tensors or {}, rank)
        return [digest, sorted(tensors)]

    answers = run_together(group, open_and_check, SharedCheckpointError)
    manifest = manifests[0]
    if len({digest for digest, _ in answers}) > 1:
        raise CheckpointError(f"{path}: the ranks see different checkpoints here (all ranks need one shared folder)")
    _check_nothing_extra(path, manifest, {name for _, names in answers for name in names}, allow_extra)
    if rank_tensors and manifest.world_size != world_size:
        if rank == 0:
            reason = f"{manifest.world_size} ranks saved {path}, {world_size} load it"
            warnings.warn(f"{reason}: no rank's own state (as its RNG) is loaded", RuntimeWarning, stacklevel=2)
        rank_tensors = None
    run_together(group, lambda: _read(path, manifest, tensors, rank_tensors or {}, rank), SharedCheckpointError)
    return manifest.state


def read_tensor(path: Path, manifest: Manifest, name: str) -> torch.Tensor:
    """Read one full tensor of a checkpoint and verify its checksums, in one process.

    Raises:
        CheckpointError: the tensor is damaged.
    """
    stored = manifest.tensors[name]
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    _read(path, manifest, {name: TensorBox.whole(tensor)}, {}, 0)
    return tensor


def _allowed(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _describe(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{dtype_name(dtype)} of shape {tuple(shape)}"


def _check_fit(path: Path, manifest: Manifest, tensors: Mapping[str, TensorBox], allow_missing: Sequence[str]) -> None:
    """Raise InputError if any tensor does not fit: the message names the first and counts the others."""
    problems = []
    for name, wanted in tensors.items():
        check(
            wanted.box.lies_in(wanted.full_shape),
            f"tensor {name!r}: the box at offset={wanted.box.offset} of shape {wanted.box.shape} must lie in "
            f"full_shape={tuple(wanted.full_shape)}",
        )
        ours = _describe(wanted.tensor.dtype, wanted.full_shape)
        stored = manifest.tensors.get(name)
        if stored is None:
            if not _allowed(name, allow_missing):
                problems.append(f"tensor {name!r} ({ours}) is not in the checkpoint")
        elif (stored.dtype, stored.shape) != (wanted.tensor.dtype, tuple(wanted.full_shape)):
            problems.append(f"tensor {name!r} is {_describe(stored.dtype, stored.shape)}, but this run needs {ours}")
    _raise_misfit(path, problems)


def _check_rank_tensors(
    path: Path, stored: Mapping[str, StoredTensor], wanted: Mapping[str, torch.Tensor], rank: int
) -> None:
    problems = []
    for name, tensor in wanted.items():
        ours = _describe(tensor.dtype, tensor.shape)
        if name not in stored:
            problems.append(f"rank tensor {name!r} ({ours}) of rank {rank} is not in the checkpoint")
        elif (stored[name].dtype, stored[name].shape) != (tensor.dtype, tuple(tensor.shape)):
            theirs = _describe(stored[name].dtype, stored[name].shape)
            problems.append(f"rank tensor {name!r} of rank {rank} is {theirs}, but this run needs {ours}")
    _raise_misfit(path, problems)


def _check_nothing_extra(path: Path, manifest: Manifest, wanted: set[str], allow_extra: Sequence[str]) -> None:
    extra = [name for name in manifest.tensors if name not in wanted and not _allowed(name, allow_extra)]
    _raise_misfit(
        path,
        [
            f"tensor {name!r} ({_describe(manifest.tensors[name].dtype, manifest.tensors[name].shape)}) is in the "
            "checkpoint, but this run does not use it"
            for name in extra
        ],
    )


def _raise_misfit(path: Path, problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more tensors do not fit)" if len(problems) > 1 else ""
        raise InputError(f"{path}: {problems[0]}{more}: {_WAY_OUT}")


def _copy_rows(target: torch.Tensor, wanted: Box, stored: Box, start: int, rows: torch.Tensor) -> None:
    """Copy the part of these rows of the stored box that lies in the wanted box into target, its tensor."""
    if not stored.shape:
        target.copy_(rows[0])
        return
    rows_box = Box((stored.offset[0] + start, *stored.offset[1:]), tuple(rows.shape))
    if here := rows_box.intersect(wanted):
        target[here.slices(wanted.offset)] = rows[here.slices(rows_box.offset)].to(target.device)


def _read(
    path: Path,
    manifest: Manifest,
    tensors: Mapping[str, TensorBox],
    rank_tensors: Mapping[str, torch.Tensor],
    rank: int,
) -> None:
    """Read, file by file, every stored box that overlaps a box that this rank wants."""
    work: dict[str, dict[str, ConsumeRows]] = {}

    def want(stored: StoredTensor, wanted: TensorBox, prefix: str, name: str) -> None:
        target, box = wanted.tensor.detach(), wanted.box
        for piece in stored.boxes:
            if piece.box.intersect(box):
                consume = functools.partial(_copy_rows, target, box, piece.box)
                work.setdefault(piece.file, {})[prefix + name] = consume

    for name, wanted in tensors.items():
        if name in manifest.tensors:
            want(manifest.tensors[name], wanted, "", name)
    for name, tensor in rank_tensors.items():
        want(manifest.rank_tensors[rank][name], TensorBox.whole(tensor), RANK_TENSOR_PREFIX, name)
    for file in sorted(work):
        with ShardFileReader(path / file, manifest.entries(file), manifest.step) as reader:
            for key, consume in work[file].items():
                stored = manifest.files[file][key]
                reader.read(stored.entry, stored.crc32, consume, stored.label)
