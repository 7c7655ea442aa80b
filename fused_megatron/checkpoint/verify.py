"""Which checkpoints are good: every byte is read and checked, and what is broken is named."""

import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from fused_megatron.checkpoint.errors import CheckpointError, SharedCheckpointError
from fused_megatron.checkpoint.folder import checkpoint_step, list_checkpoints
from fused_megatron.checkpoint.manifest import Manifest, read_manifest
from fused_megatron.checkpoint.shard_file import ShardFileReader
from fused_megatron.collectives.groups import group_rank, group_size
from fused_megatron.collectives.together import run_on_first, run_together


def verify_checkpoint(path: str | os.PathLike[str]) -> list[str]:
    """What is wrong with the checkpoint at path, a line each: file, tensor, found, expected. Empty: it is good."""
    path = Path(path)
    try:
        manifest = read_manifest(path)
        return _wrong_name(path, manifest) + _verify_files(path, manifest, list(manifest.files))
    except (CheckpointError, OSError) as error:
        return [str(error)]


def newest_checkpoint(folder: str | os.PathLike[str], group: dist.ProcessGroup | None = None) -> Path | None:
    """The newest checkpoint in folder that verifies, the same on all ranks; None where there is none.

    A broken one is passed over, with a warning that names the file and the tensor. The ranks share the reading.

    Args:
        folder: of the run's checkpoints; it may be absent.
        group: all ranks of the run; None when there is one.

    Communication: one exchange of JSON, and one more for each checkpoint that is looked at.
    """
    rank, world_size = group_rank(group), group_size(group)
    folder = Path(folder)
    # Rank 0's list: another process may be adding to the folder.
    names = run_on_first(group, lambda: [path.name for path in list_checkpoints(folder)], SharedCheckpointError)
    for name in names:
        path = folder / name
        verify_share = functools.partial(_verify_share, path, rank, world_size)
        problems = [
            problem for answer in run_together(group, verify_share, SharedCheckpointError) for problem in answer
        ]
        if not problems:
            return path
        if rank == 0:
            more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
            warnings.warn(f"checkpoint passed over: {problems[0]}{more}", RuntimeWarning, stacklevel=2)
    return None


def _verify_share(path: Path, rank: int, world_size: int) -> list[str]:
    try:
        manifest = read_manifest(path)
        named_wrong = _wrong_name(path, manifest) if rank == 0 else []
        return named_wrong + _verify_files(path, manifest, sorted(manifest.files)[rank::world_size])
    except (CheckpointError, OSError) as error:
        return [str(error)]


def _wrong_name(path: Path, manifest: Manifest) -> list[str]:
    """A folder that is named as one step and holds another; a name of the user's own (`best`) is no mistake."""
    try:
        stated = checkpoint_step(path)
    except CheckpointError:
        return []
    return [] if stated == manifest.step else [f"{path}: it holds step {manifest.step}"]


def _verify_files(path: Path, manifest: Manifest, files: Sequence[str]) -> list[str]:
    problems = []
    for file in files:
        try:
            with ShardFileReader(path / file, manifest.entries(file), manifest.step) as reader:
                for stored in manifest.files[file].values():
                    try:
                        reader.read(stored.entry, stored.crc32, None, stored.label)
                    except CheckpointError as error:
                        problems.append(str(error))
        except CheckpointError as error:
            problems.append(str(error))
    return problems
