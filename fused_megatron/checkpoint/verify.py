"""Verification of checkpoints, and the search for the newest good one. Every byte is read and checked."""

import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from fused_megatron.checkpoint.errors import CheckpointError, SharedCheckpointError, UnreadableError
from fused_megatron.checkpoint.folder import checkpoint_step, list_checkpoints
from fused_megatron.checkpoint.manifest import Manifest, read_manifest
from fused_megatron.checkpoint.shard_file import ShardFileReader
from fused_megatron.checks import SharedInputError
from fused_megatron.collectives.groups import group_rank, group_size
from fused_megatron.collectives.together import run_on_first, run_together


def verify_checkpoint(path: str | os.PathLike[str]) -> list[str]:
    """Return a line for every problem of the checkpoint at path: file, tensor, found, expected. [] if it is good."""
    path = Path(path)
    try:
        manifest = read_manifest(path)
        problems = _name_problems(path, manifest) + _file_problems(path, manifest, list(manifest.files))
        return [problem.text for problem in problems]
    except (CheckpointError, OSError) as error:
        return [str(error)]


class _Problem(NamedTuple):
    """Problem of a checkpoint.

    Attributes:
        text: one line.
        may_be_whole: True if a file could not be read, so that the checkpoint may still be good.
    """

    text: str
    may_be_whole: bool = False


def newest_checkpoint(folder: str | os.PathLike[str], group: dist.ProcessGroup | None = None) -> Path | None:
    """Return the newest good checkpoint in folder, the same on all ranks; None if there is none.

    A damaged checkpoint is passed over, with a warning that names the file and the tensor. The ranks share the reading.

    Args:
        folder: of the run's checkpoints; it may be missing.
        group: all ranks of the run; None: one rank.

    Raises:
        InputError: on every rank, if the folder cannot be read.

    Communication: one exchange of JSON, and another for each checkpoint that is read.
    """
    return _search(folder, group)[0]


def checkpoint_to_resume(folder: str | os.PathLike[str], group: dist.ProcessGroup | None = None) -> Path | None:
    """Return the newest good checkpoint in folder, for a run to resume from; None only if the folder has none at all.

    Arguments and communication: as newest_checkpoint. Checkpoints that are not good raise an error here, since a run
    that started anew beside them would replace them.

    Raises:
        SharedInputError: there are checkpoints but none is good; or one that is newer than the good one cannot be read
            now, and may be good. Nothing was changed.
    """
    found, passed_over = _search(folder, group)
    unreadable = [path for path, problem in passed_over if problem.may_be_whole]
    if unreadable:
        problem = dict(passed_over)[unreadable[0]]
        others = f" (and {len(unreadable) - 1} more in {folder})" if unreadable[1:] else ""
        raise SharedInputError(
            f"{problem.text}{others}: it may be good, so the run does not resume from an older one: make "
            f"it readable, or move {unreadable[0]} to another folder to go on without it"
        )
    if passed_over and found is None:
        names = ", ".join(path.name for path, _ in passed_over)
        raise SharedInputError(
            f"{folder} has no checkpoint that is good ({names}; {passed_over[0][1].text}): put back a copy, or move "
            f"them to another folder to begin anew"
        )
    return found


def _search(
    folder: str | os.PathLike[str], group: dist.ProcessGroup | None
) -> tuple[Path | None, list[tuple[Path, _Problem]]]:
    """Return the newest good checkpoint, and all newer ones with the first problem of each."""
    rank, world_size = group_rank(group), group_size(group)
    folder = Path(folder)
    # Rank 0's list: another process may be adding to the folder.
    names = run_on_first(group, lambda: [path.name for path in list_checkpoints(folder)], SharedCheckpointError)
    passed_over: list[tuple[Path, _Problem]] = []
    for name in names:
        path = folder / name
        verify_share = functools.partial(_verify_share, path, rank, world_size)
        answers = run_together(group, verify_share, SharedCheckpointError)
        problems = [_Problem(*problem) for answer in answers for problem in answer]
        if not problems:
            return path, passed_over
        # Known damage first: then the checkpoint cannot be good, even if another file could not be read.
        problems.sort(key=lambda problem: problem.may_be_whole)
        passed_over.append((path, problems[0]))
        if rank == 0:
            more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
            warnings.warn(f"checkpoint passed over: {problems[0].text}{more}", RuntimeWarning, stacklevel=3)
    return None, passed_over


def _verify_share(path: Path, rank: int, world_size: int) -> list[_Problem]:
    try:
        manifest = read_manifest(path)
        wrong_name = _name_problems(path, manifest) if rank == 0 else []
        return wrong_name + _file_problems(path, manifest, sorted(manifest.files)[rank::world_size])
    except (CheckpointError, OSError) as error:
        return [_problem(error)]


def _problem(error: CheckpointError | OSError) -> _Problem:
    return _Problem(str(error), isinstance(error, UnreadableError | OSError))


def _name_problems(path: Path, manifest: Manifest) -> list[_Problem]:
    """Return a problem if the folder's name states another step than it holds; a user's own name (`best`) is fine."""
    try:
        stated = checkpoint_step(path)
    except CheckpointError:
        return []
    return [] if stated == manifest.step else [_Problem(f"{path}: it holds step {manifest.step}")]


def _file_problems(path: Path, manifest: Manifest, files: Sequence[str]) -> list[_Problem]:
    problems = []
    for file in files:
        try:
            with ShardFileReader(path / file, manifest.entries(file), manifest.step) as reader:
                for stored in manifest.files[file].values():
                    try:
                        reader.read(stored.entry, stored.crc32, None, stored.label)
                    except CheckpointError as error:
                        problems.append(_problem(error))
        except CheckpointError as error:
            problems.append(_problem(error))
    return problems
