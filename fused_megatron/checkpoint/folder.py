"""The folder of a run's checkpoints: what its names mean, what is newest, what may go.

    step-000100               a whole checkpoint
    step-000100.tmp-<id>      a save at work, or one that died
    step-000100.old-<id>      the checkpoint that a second save of the step replaces: whole, and good until that is done
    step-000100.trash-<id>    being deleted

There is no pointer to the latest one: a pointer can be wrong, a scan cannot.
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
    """The step that the name of a checkpoint folder states."""
    match = _CHECKPOINT.fullmatch(Path(path).name)
    if match is None:
        raise CheckpointError(f"{path}: not a checkpoint folder (they are named step-000100)")
    return int(match[1])


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The finished checkpoints in folder, newest first, by name only: `verify_checkpoint` tells which are good.

    Raises:
        InputError: the folder is there and cannot be read.
    """
    folder = Path(folder)
    try:
        with os.scandir(folder) as entries:
            # A link whose target is away (a disk that is not mounted) names a checkpoint all the same.
            found = [
                folder / entry.name
                for entry in entries
                if _CHECKPOINT.fullmatch(entry.name) and (entry.is_symlink() or entry.is_dir())
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror} (it may hold checkpoints)") from error
    # Of one step, the plain name before one that was set aside.
    return sorted(found, key=lambda path: (-checkpoint_step(path), "." in path.name, path.name))


def open_whole(path: Path, manifest: Manifest) -> None:
    """Raise CheckpointError unless every file is there with the right size and header. Reads no data."""
    for name in manifest.files:
        ShardFileReader(path / name, manifest.entries(name), manifest.step).close()


def _looks_good(path: Path) -> bool | None:
    """Whether manifest, sizes and headers are right; None where they cannot be read now."""
    try:
        open_whole(path, read_manifest(path))
    except (UnreadableError, OSError):
        return None
    except CheckpointError:
        return False
    return True


def remove_leftovers(folder: Path) -> None:
    """Delete what saves and deletions that died left behind. Only for a save, of which a run has one at a time."""
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def remove_superseded(folder: Path, saved: Path, keep: int | None) -> None:
    """After `saved` is in place: delete what it replaced, and all that is older than the newest `keep` good ones.

    Here a checkpoint counts as good by its manifest, sizes and headers: reading all the data at every save would cost
    more than the save. One that cannot be read now stays, and so does a link. Failing to delete is a warning: the save
    itself is done.
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
