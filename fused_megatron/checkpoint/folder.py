"""Folder of a run's checkpoints: names, order by age, and deletion of old ones.

    step-000100               a complete checkpoint
    step-000100.tmp-<id>      a save in progress, or one that was killed
    step-000100.old-<id>      a complete checkpoint that a second save of the same step is replacing
    step-000100.trash-<id>    a checkpoint that is being deleted

No file points to the latest checkpoint: a pointer can be wrong, a scan cannot.
"""

import os
import re
import shutil
import warnings
from pathlib import Path

from fused_megatron.checkpoint.errors import CheckpointError, UnreadableError
from fused_megatron.checkpoint.manifest import Manifest, read_manifest
from fused_megatron.checkpoint.shard_file import ShardFileReader
from fused_megatron.checks import InputError
from fused_megatron.durable import remove_folder

_CHECKPOINT = re.compile(r"step-([0-9]{6,18})(\.old-[0-9a-f]+)?")
_LEFTOVER = re.compile(r"step-[0-9]{6,18}\.(tmp|trash)-[0-9a-f]+")


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def checkpoint_step(path: str | os.PathLike[str]) -> int:
    """Return the step in the name of a checkpoint folder."""
    match = _CHECKPOINT.fullmatch(Path(path).name)
    if match is None:
        raise CheckpointError(f"{path}: not a checkpoint folder (they are named step-000100)")
    return int(match[1])


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """List the finished checkpoints in folder, newest first, by name only; `verify_checkpoint` reads and checks one.

    Raises:
        InputError: the folder exists and cannot be read.
    """
    folder = Path(folder)
    try:
        with os.scandir(folder) as entries:
            # A link names a checkpoint even if its target is missing (a disk that is not mounted).
            found = [
                folder / entry.name
                for entry in entries
                if _CHECKPOINT.fullmatch(entry.name) and (entry.is_symlink() or entry.is_dir())
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror} (it may hold checkpoints)") from error
    # For the same step, the plain name comes before a name with .old-.
    return sorted(found, key=lambda path: (-checkpoint_step(path), "." in path.name, path.name))


def check_files(path: Path, manifest: Manifest) -> None:
    """Raise CheckpointError unless every file exists with the right size and header. Reads no tensor data."""
    for name in manifest.files:
        ShardFileReader(path / name, manifest.entries(name), manifest.step).close()


def _looks_good(path: Path) -> bool | None:
    """Return whether manifest, file sizes and headers are right; None if they cannot be read now."""
    try:
        check_files(path, read_manifest(path))
    except (UnreadableError, OSError):
        return None
    except CheckpointError:
        return False
    return True


def remove_leftovers(folder: Path) -> None:
    """Delete the remains of killed saves and deletions. Call it only from a save: a run has one save at a time."""
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def remove_superseded(folder: Path, saved: Path, keep: int | None) -> None:
    """Delete the checkpoint that `saved` replaced, and every checkpoint older than the newest `keep` good ones.

    Call it after `saved` is complete. A checkpoint counts as good here by its manifest, file sizes and headers: reading
    all data at every save would cost more than the save. Links, and checkpoints that cannot be read now, are kept. A
    failed deletion is a warning, since the save itself has succeeded.
    """
    try:
        for path in list_checkpoints(folder):
            replaced = folder / path.name.split(".")[0]
            if path != replaced and (replaced == saved or _looks_good(replaced)):
                remove_folder(path)
        if keep is None:
            return
        num_good = 0
        for path in list_checkpoints(folder):
            looks_good = path == saved or _looks_good(path)
            if num_good < keep:
                num_good += bool(looks_good)
            elif path != saved and looks_good is not None and not path.is_symlink():
                remove_folder(path)
    except (OSError, InputError) as error:
        warnings.warn(f"an old checkpoint could not be deleted: {error}", RuntimeWarning, stacklevel=2)
