"""Faults of checkpoints: a rank killed in a save, files damaged or made by a stranger, a full disk."""

import functools
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from outcomes import Answer, NotHere, Outcome, Seen, ending_words, error_words, loaded_words, on_ranks, text_of
from savers import COLUMNS, NAME, ROWS, SAVERS, box_of, megatron

from fused_megatron.checkpoint import save_checkpoint

RANKS = 2
KILLED = 1
DISK_BYTES = 3 << 20
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def save(rank: int, ranks: int, system: str, folder: Path, step: str, dies: str | None = None) -> Answer:
    """Save step A (ones) or B (twos); rank KILLED dies before its first byte, or after half of its rows are written."""
    rows = torch.full((ROWS, COLUMNS), {"A": 1.0, "B": 2.0}[step])
    if dies is not None and rank == KILLED:
        die_writing(rows.nbytes // 2) if dies == "within" else die_before_writing(system, folder)
    try:
        SAVERS[system].save(folder, rows, rank, ranks)
    except NotHere:
        raise
    except Exception as error:
        if dies is not None:
            raise Seen("error", text_of(error)) from None
        return "error", text_of(error)
    return "value", None


def die_before_writing(system: str, folder: Path) -> None:
    """Where Python opens the first file; a library in another language is not even begun."""
    process = os.getpid()
    if not SAVERS[system].in_python:
        os.kill(process, signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITING and os.fsdecode(path).startswith(f"{folder}{os.sep}"):
                os.kill(process, signal.SIGKILL)

    sys.addaudithook(hook)


def die_writing(num_bytes: int) -> None:
    """The kernel ends the process that writes more than so many bytes to a file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def load(
    rank: int,
    ranks: int,
    system: str,
    folder: Path,
    rows: int = ROWS,
    dtype: torch.dtype = torch.float32,
    name: str = NAME,
) -> Answer:
    """What this rank gets: the values that there are in it."""
    try:
        got = SAVERS[system].load(folder, torch.zeros(rows, COLUMNS, dtype=dtype), rank, ranks, name)
    except NotHere:
        raise
    except Exception as error:
        return "error", text_of(error)
    return "value", tuple(got.unique()[:3].tolist())


def begun(folder: Path, system: str, *, of_ranks: int = 1, name: str = "run") -> Path:
    """A folder with step A.

    Raises:
        NotHere: the system is not installed.
    """
    return Path(shutil.copytree(saved(system, of_ranks).name, folder / name))


@functools.cache
def saved(system: str, of_ranks: int) -> tempfile.TemporaryDirectory[str]:
    """Step A, once for all faults."""
    if system == "megatron-core":
        megatron(".dist_checkpointing")
    checkpoint = tempfile.TemporaryDirectory(prefix="faults-")
    for kind, value in on_ranks(save, of_ranks, system, Path(checkpoint.name), "A", limit_s=180):
        if kind != "value":
            raise RuntimeError(f"{system} does not even save: {value}")
    return checkpoint


def killed(system: str, dies: str, first: bool, folder: Path) -> str:
    """A rank dies in the second save of a folder, or in its first; what a load finds then."""
    if first:
        begun(folder, system, name="other")
        checkpoint = folder / "run"
        checkpoint.mkdir()
    else:
        checkpoint = begun(folder, system, of_ranks=RANKS)
    answers = on_ranks(save, RANKS, system, checkpoint, "B", dies, limit_s=20)
    if not first and answers[KILLED][0] in ("value", "error"):
        return f"refuses to save there: {error_words(str(answers[KILLED][1]), folder)}"
    return loaded_words(on_ranks(load, RANKS, system, checkpoint), folder)


def files_of(checkpoint: Path) -> list[Path]:
    """The largest first."""
    return sorted((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)


def damaged(system: str, damage: Callable[[Path], None], folder: Path) -> str:
    """The file with the tensor is damaged; what a load finds."""
    checkpoint = begun(folder, system)
    damage(files_of(checkpoint)[0])
    return loaded_words(on_ranks(load, 1, system, checkpoint), folder)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << 4
    path.write_bytes(content)


def cut_to_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def loaded_as(system: str, options: dict[str, Any], folder: Path) -> str:
    """Loaded into a tensor of another dtype, shape or name."""
    checkpoint = begun(folder, system)
    words = loaded_words(on_ranks(load, 1, system, checkpoint, *options.values()), folder)
    return "converts it, and does not say so" if words == "loads step A" else words


class MakesAFolder:
    """What a stranger may put into a pickle: it is called when the pickle is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def of_a_stranger(system: str, folder: Path) -> str:
    """One file after the other is a pickle that runs code when it is read."""
    words = ""
    for number, name in enumerate(
        path.relative_to(saved(system, 1).name) for path in files_of(Path(saved(system, 1).name))
    ):
        checkpoint = begun(folder, system, name=f"run-{number}")
        (checkpoint / name).write_bytes(pickle.dumps(MakesAFolder(folder / "made by the pickle")))
        words = loaded_words(on_ranks(load, 1, system, checkpoint), folder)
        if (folder / "made by the pickle").exists():
            return f"**runs the code in `{name}`**"
    return words


def disk_full(system: str, folder: Path) -> str:
    """On a disk that has room for half a checkpoint."""
    with small_disk(folder) as disk:
        size = sum(path.stat().st_size for path in files_of(begun(folder, system)))
        (disk / "other").write_bytes(bytes(DISK_BYTES - size // 2))
        (disk / "b").mkdir()
        ((kind, value),) = on_ranks(save, 1, system, disk / "b", "B")
        left = sum(path.stat().st_size for path in files_of(disk / "b"))
    if kind != "error":
        return ending_words((kind, value)) if kind != "value" else "**saves, silently**"
    rest = f"; a part of {left / 1e6:.1f} MB stays" if left else "; nothing of it stays"
    return error_words(str(value), disk) + rest


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    disk = folder / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise NotHere(f"a small disk needs root: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def older_one(folder: Path) -> str:
    """The newest of two checkpoints of a run is cut to half: ours looks for the newest good one."""
    checkpoint = begun(folder, "fused-megatron")
    ((kind, value),) = on_ranks(save_newer, 1, checkpoint)
    assert kind == "value", value
    newest = max(checkpoint.iterdir(), key=lambda path: path.name)
    cut_to_half(files_of(newest)[0])
    return loaded_words(on_ranks(load, 1, "fused-megatron", checkpoint), folder)


def save_newer(rank: int, ranks: int, folder: Path) -> Answer:
    save_checkpoint(folder, 2, {NAME: box_of(torch.full((ROWS, COLUMNS), 2.0), rank, ranks)}, state={})
    return "value", None


def in_all(function: Callable[..., str], *args: Any) -> dict[str, Outcome]:
    return {system: partial(function, system, *args) for system in SAVERS}


FAULTS: dict[str, dict[str, Outcome]] = {
    "a rank is killed before it writes its part of a second save into the same folder": in_all(killed, "before", False),
    "a rank is killed when half of its part of a second save is written": in_all(killed, "within", False),
    "a rank is killed in the first save of a folder": in_all(killed, "within", True),
    "one flipped bit in a tensor": in_all(damaged, flip_a_bit),
    "the file of the tensor is cut to half": in_all(damaged, cut_to_half),
    "the newest checkpoint is cut to half, an older one is good": {"fused-megatron": older_one},
    "float32 in the file, float64 in the model": in_all(loaded_as, {"rows": ROWS, "dtype": torch.float64}),
    "another shape in the model": in_all(loaded_as, {"rows": ROWS // 2}),
    "the model has a tensor that the file has not": in_all(
        loaded_as, {"rows": ROWS, "dtype": torch.float32, "name": "bias"}
    ),
    "a file is a pickle that calls a function (each file in turn)": in_all(of_a_stranger),
    "the disk is full in a save": in_all(disk_full),
}
