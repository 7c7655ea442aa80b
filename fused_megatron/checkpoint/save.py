"""Atomic saving of a checkpoint: it is either complete on disk, or absent with all earlier checkpoints intact."""

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fused_megatron.checkpoint.errors import (
    CheckpointError,
    SharedCheckpointError,
    disk_full,
    explain_os_error,
    free_bytes,
)
from fused_megatron.checkpoint.folder import checkpoint_name, remove_leftovers, remove_superseded
from fused_megatron.checkpoint.manifest import (
    MANIFEST_NAME,
    RANK_TENSOR_PREFIX,
    Manifest,
    StoredBox,
    StoredTensor,
    check_json_state,
    file_name,
)
from fused_megatron.checkpoint.shard_file import Entry, file_bytes, write_shard_file
from fused_megatron.checks import InputError, check, dtype_name
from fused_megatron.collectives.groups import group_rank, group_size
from fused_megatron.collectives.together import run_on_first, run_together
from fused_megatron.durable import new_durable_file, sync_folder, write_all
from fused_megatron.sharding.box import Box, TensorBox, cover_problem
from fused_megatron.weight_files import SAFETENSORS_DTYPES

_DTYPES = {dtype_name(dtype): dtype for dtype in SAFETENSORS_DTYPES}
# For headers, the manifest, and the file system's own data.
_SPACE_MARGIN_BYTES = 1 << 20

Held = list[dict[str, list[Any]]]
"""For each rank: [dtype, full shape, offset, shape] by tensor name; private tensors have RANK_TENSOR_PREFIX."""


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, TensorBox],
    *,
    state: dict[str, Any],
    rank_tensors: Mapping[str, torch.Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    keep: int | None = 2,
) -> Path:
    """Save a checkpoint as `folder/step-000100`. All ranks must call this together.

    A kill at any moment leaves either no `step-000100` or a complete one, and never harms an earlier checkpoint. The
    files go to a temporary folder, each file is synced, the manifest is written last, and one rename finishes the
    checkpoint. If several ranks hold the same box, one of them writes it, chosen so that all ranks write about the same
    number of bytes.

    Args:
        folder: of the run's checkpoints; made if it does not exist. All ranks must see the same folder.
        step: number of finished steps; >= 0. An existing checkpoint of this step stays until the new one is complete.
        tensors: this rank's boxes, by name; any dtype of safetensors, any device and strides. Over all ranks, the boxes
            of a name must cover its full tensor exactly once, but equal boxes (replicas) are allowed.
        state: JSON values (data position, layout, config); the state of rank 0 is stored. Floats are restored exactly,
            tuples as lists; NaN and Inf are refused.
        rank_tensors: tensors that only this rank has, for example RNG states.
        group: all ranks of the run; None: one rank.
        keep: number of good checkpoints to keep; older ones are deleted after the new one is complete. None: keep all.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: on every rank, if the boxes do not fit together or state is not JSON.
        CheckpointError: on every rank, if a write failed on any rank (as on a full disk) or a rank died. No new files
            remain.

    Communication: five exchanges of JSON; one of them has the names and shapes of all tensors.
    Memory: one block of 4 MiB, or one row, at a time; a StreamedBox is held whole while it is written.
    """
    rank_tensors = rank_tensors or {}
    plan = agree_on_plan(step, tensors, rank_tensors, state=state, keep=keep, group=group)
    source = plan.sources(group_rank(group), tensors, rank_tensors)
    return write_checkpoint(Path(folder), step, plan, source, state=state, keep=keep, group=group)


@dataclass(frozen=True)
class WritePlan:
    """Boxes of a checkpoint and the rank that writes each of them; the same on every rank.

    Attributes:
        held: the tensors of each rank.
        writers: the boxes (none empty) of each full tensor, and the rank that writes each.
        entries: of each rank's file.
    """

    held: Held
    writers: dict[str, dict[Box, int]]
    entries: list[list[Entry]]

    @classmethod
    def of(cls, held: Held) -> "WritePlan":
        """Distribute the boxes over the ranks that hold them.

        Raises:
            InputError: the boxes do not fit together.
        """
        writers = _assign_writers(held)
        return cls(held, writers, [_entries_to_write(rank, held, writers) for rank in range(len(held))])

    def sources(
        self, rank: int, tensors: Mapping[str, TensorBox], rank_tensors: Mapping[str, torch.Tensor]
    ) -> Mapping[Entry, torch.Tensor]:
        """Return the tensors that a rank writes, by entry."""
        return _TensorsByEntry(self.entries[rank], tensors, rank_tensors)


def agree_on_plan(
    step: int,
    tensors: Mapping[str, TensorBox],
    rank_tensors: Mapping[str, torch.Tensor],
    *,
    state: dict[str, Any],
    keep: int | None,
    group: dist.ProcessGroup | None,
    known: WritePlan | None = None,
) -> WritePlan:
    """Check the arguments of save_checkpoint on every rank; return who writes which box.

    Args:
        known: plan of an earlier save of the same ranks. A rank whose boxes have not changed does not send them again.

    Raises:
        InputError: on every rank, as save_checkpoint.

    Communication: one exchange of JSON; without `known` it has the names and shapes of all tensors.
    """
    rank = group_rank(group)

    def describe() -> dict[str, Any]:
        held: dict[str, list[Any]] | None = _describe(step, tensors, rank_tensors, state, keep)
        return {"step": step, "held": None if known is not None and held == known.held[rank] else held}

    answers = run_together(group, describe, SharedCheckpointError)
    steps = [answer["step"] for answer in answers]
    check(len(set(steps)) == 1, f"step={steps} by rank: all ranks must save the same step")
    changed = [answer["held"] for answer in answers]
    if known is None:
        return WritePlan.of(changed)
    if all(held is None for held in changed):
        return known
    return WritePlan.of([before if now is None else now for before, now in zip(known.held, changed, strict=True)])


def write_checkpoint(
    folder: Path,
    step: int,
    plan: WritePlan,
    source: Mapping[Entry, torch.Tensor],
    *,
    state: dict[str, Any],
    keep: int | None,
    group: dist.ProcessGroup | None,
) -> Path:
    """Write the files of a plan, finish the checkpoint with one rename, and delete old ones.

    Args:
        source: tensors of this rank's entries, read one after the other.
        folder, step, state, keep, group: as save_checkpoint.

    Returns, Raises: as save_checkpoint.

    Communication: four exchanges of JSON; nothing else.
    """
    rank, world_size = group_rank(group), group_size(group)
    final = folder / checkpoint_name(step)
    total_bytes = sum(file_bytes(entries, step) for entries in plan.entries if entries)

    temporary = folder / run_on_first(group, lambda: _begin(final, total_bytes), SharedCheckpointError)
    try:
        path = temporary / file_name(rank, world_size)
        checksums = run_together(
            group, lambda: _write_file(path, source, step) if source else {}, SharedCheckpointError
        )
        run_on_first(
            group, lambda: _finish(temporary, final, _manifest(step, plan, checksums, state)), SharedCheckpointError
        )
    except BaseException:
        if rank == 0:  # the other ranks have finished writing, or are dead
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    run_on_first(group, lambda: remove_superseded(folder, final, keep), SharedCheckpointError)
    return final


def _describe(
    step: int,
    tensors: Mapping[str, TensorBox],
    rank_tensors: Mapping[str, torch.Tensor],
    state: dict[str, Any],
    keep: int | None,
) -> dict[str, list[Any]]:
    """Check this rank's arguments; return the tensors that it holds, to be sent to all ranks."""
    check(type(step) is int and step >= 0, f"step={step} must be an int >= 0")
    check(keep is None or keep >= 1, f"keep={keep} must be at least 1 (or None to keep all)")
    check(isinstance(state, dict), f"state is a {type(state).__name__}: must be a dict")
    check_json_state(state)
    held: dict[str, list[Any]] = {}
    for name, item in tensors.items():
        check(
            bool(name) and not name.startswith((RANK_TENSOR_PREFIX, "__metadata__")), f"tensor name {name!r} is taken"
        )
        box = item.box
        check(
            box.lies_in(item.full_shape),
            f"tensor {name!r}: the box at offset={box.offset} of shape {box.shape} must lie in full_shape="
            f"{tuple(item.full_shape)} (leave padding out of the box)",
        )
        held[name] = [_checked_dtype(name, item.tensor), list(item.full_shape), list(box.offset), list(box.shape)]
    for name, tensor in rank_tensors.items():
        shape = list(tensor.shape)
        held[RANK_TENSOR_PREFIX + name] = [_checked_dtype(name, tensor), shape, [0] * len(shape), shape]
    return held


def _checked_dtype(name: str, tensor: torch.Tensor) -> str:
    check(tensor.dtype in SAFETENSORS_DTYPES, f"tensor {name!r}: safetensors cannot hold {tensor.dtype}")
    return dtype_name(tensor.dtype)


def _assign_writers(ranks: Held) -> dict[str, dict[Box, int]]:
    """Return the boxes (none empty) of each full tensor, and the rank that writes each; the same on every rank."""
    holders: dict[str, dict[Box, list[int]]] = {}
    kinds: dict[str, tuple[int, str, tuple[int, ...]]] = {}
    load = [0] * len(ranks)
    for rank, held in enumerate(ranks):
        for name, (dtype, full_shape, offset, shape) in held.items():
            box = Box(tuple(offset), tuple(shape))
            if name.startswith(RANK_TENSOR_PREFIX):
                load[rank] += box.volume * _DTYPES[dtype].itemsize
                continue
            first_rank, *kind = kinds.setdefault(name, (rank, dtype, tuple(full_shape)))
            if kind != [dtype, tuple(full_shape)]:
                raise InputError(
                    f"tensor {name!r} is {kind[0]} of full shape {kind[1]} on rank {first_rank}, but {dtype} of "
                    f"{tuple(full_shape)} on rank {rank}: all ranks must agree"
                )
            holders.setdefault(name, {})
            if box.volume:
                holders[name].setdefault(box, []).append(rank)
    for name, boxes in holders.items():
        if problem := cover_problem(kinds[name][2], list(boxes)):
            raise InputError(f"tensor {name!r}: the boxes of the ranks must cover it exactly once: {problem}")
    writers: dict[str, dict[Box, int]] = {name: {} for name in holders}
    bytes_of = {name: _DTYPES[kinds[name][1]].itemsize for name in holders}
    pieces = [(box.volume * bytes_of[name], name, box) for name, boxes in holders.items() for box in boxes]
    # Boxes with a single holder first, then by decreasing size (greedy balancing).
    for num_bytes, name, box in sorted(pieces, key=lambda p: (len(holders[p[1]][p[2]]) > 1, -p[0], p[1], p[2])):
        writer = min(holders[name][box], key=lambda r: (load[r], r))
        load[writer] += num_bytes
        writers[name][box] = writer
    return writers


def _entries_to_write(rank: int, ranks: Held, writers: dict[str, dict[Box, int]]) -> list[Entry]:
    """Return the entries that the rank writes into its file."""
    entries = []
    for name, (dtype, _, offset, shape) in ranks[rank].items():
        box = Box(tuple(offset), tuple(shape))
        if name.startswith(RANK_TENSOR_PREFIX) or writers[name].get(box) == rank:
            entries.append(Entry(name, _DTYPES[dtype], box.shape))
    return entries


class _TensorsByEntry(Mapping[Entry, torch.Tensor]):
    """Tensors to write, by entry; a StreamedBox is read anew for each access, and not kept."""

    def __init__(
        self, entries: Iterable[Entry], tensors: Mapping[str, TensorBox], rank_tensors: Mapping[str, torch.Tensor]
    ) -> None:
        self._entries = list(entries)
        self._tensors, self._rank_tensors = tensors, rank_tensors

    def __getitem__(self, entry: Entry) -> torch.Tensor:
        if entry.key.startswith(RANK_TENSOR_PREFIX):
            return self._rank_tensors[entry.key.removeprefix(RANK_TENSOR_PREFIX)]
        return self._tensors[entry.key].values()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _begin(final: Path, total_bytes: int) -> str:
    """Delete the remains of killed saves, check the free space, make the temporary folder, and return its name."""
    folder = final.parent
    temporary = folder / f"{final.name}.tmp-{secrets.token_hex(4)}"
    needed = total_bytes + _SPACE_MARGIN_BYTES
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        if free_bytes(folder) < needed:
            raise CheckpointError(f"{final} not saved: {disk_full(folder, needed)}")
        os.mkdir(temporary)
    except OSError as error:
        raise CheckpointError(f"{final} not saved: {folder}: {explain_os_error(error, folder, needed)}") from error
    return temporary.name


def _write_file(path: Path, tensors: Mapping[Entry, torch.Tensor], step: int) -> dict[str, int]:
    try:
        return write_shard_file(path, tensors, step)
    except OSError as error:
        reason = explain_os_error(error, path.parent, file_bytes(list(tensors), step))
        raise CheckpointError(f"{path.name} of {path.parent} not written: {reason}") from error


def _manifest(step: int, plan: WritePlan, checksums: list[dict[str, int]], state: dict[str, Any]) -> Manifest:
    files = [file_name(rank, len(plan.held)) for rank in range(len(plan.held))]
    tensors: dict[str, StoredTensor] = {}
    rank_tensors: dict[int, dict[str, StoredTensor]] = {}
    for rank, held in enumerate(plan.held):
        for name, (dtype_text, full_shape, *_) in held.items():
            dtype, shape = _DTYPES[dtype_text], tuple(full_shape)
            if name.startswith(RANK_TENSOR_PREFIX):
                block = StoredBox(files[rank], Box((0,) * len(shape), shape), checksums[rank][name])
                private = rank_tensors.setdefault(rank, {})
                private[name.removeprefix(RANK_TENSOR_PREFIX)] = StoredTensor(dtype, shape, (block,))
            elif name not in tensors:
                boxes = sorted(plan.writers[name].items())
                blocks = tuple(StoredBox(files[r], box, checksums[r][name]) for box, r in boxes)
                tensors[name] = StoredTensor(dtype, shape, blocks)
    return Manifest(step, len(plan.held), tensors, rank_tensors, state)


def _finish(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest and rename the temporary folder; after this the checkpoint exists."""
    content = manifest.to_bytes()
    aside = final.with_name(f"{final.name}.old-{secrets.token_hex(4)}")
    try:
        with new_durable_file(temporary / MANIFEST_NAME) as descriptor:
            write_all(descriptor, memoryview(content))
        sync_folder(temporary)
        if final.is_dir():
            os.rename(final, aside)
        os.rename(temporary, final)
        sync_folder(final.parent)
    except OSError as error:
        if aside.is_dir() and not final.is_dir():
            os.rename(aside, final)
        reason = explain_os_error(error, final.parent, len(content))
        raise CheckpointError(f"{final} not saved: {MANIFEST_NAME}: {reason}") from error
