"""Ranks as processes of their own, watched from a fault on: when each ended, and what it said."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 30.0
# Imports on a busy machine.
START_S = 600.0
_LOOK_S = 0.05


@dataclass
class Ended:
    """A rank after a fault.

    Attributes:
        code: with which it ended; None where it did not.
        after_s: since the fault.
        lines: what it said on the standard error.
    """

    code: int | None
    after_s: float
    lines: list[str]


class Ranks:
    """Processes whose outputs go to files.

    Args:
        folder: of these.
        commands: by rank.
        environments: by rank, beside this process's own.
    """

    def __init__(self, folder: Path, commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
            with open(folder / f"{rank}.out", "wb") as out, open(folder / f"{rank}.err", "wb") as err:
                process = subprocess.Popen(command, env=own, stdout=out, stderr=err, start_new_session=True)
            self._processes.append(process)

    def said(self, rank: int) -> str:
        """On the standard output."""
        return (self._folder / f"{rank}.out").read_text(errors="replace")

    def errors(self, rank: int) -> list[str]:
        return (self._folder / f"{rank}.err").read_text(errors="replace").splitlines()

    def wait_for(self, rank: int, text: str) -> None:
        """Until a rank has said it."""
        deadline = time.monotonic() + START_S
        while text not in self.said(rank):
            ended = [number for number, process in enumerate(self._processes) if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                told = "; ".join(line for number in ended for line in self.errors(number)[-2:])
                raise RuntimeError(f"rank {rank} did not come to {text!r}: {told or 'too slow'}")
            time.sleep(_LOOK_S)

    def watch(self, ranks: Iterable[int], limit_s: float = LIMIT_S) -> dict[int, Ended]:
        """From now on, the fault, until these ranks have ended."""
        begun, found = time.monotonic(), {rank: Ended(None, limit_s, []) for rank in ranks}
        while time.monotonic() < begun + limit_s and any(ended.code is None for ended in found.values()):
            for rank, ended in found.items():
                if ended.code is None and self._processes[rank].poll() is not None:
                    ended.code, ended.after_s = self._processes[rank].returncode, time.monotonic() - begun
            time.sleep(_LOOK_S)
        for rank, ended in found.items():
            ended.lines = self.errors(rank)
        return found

    def end(self) -> None:
        """Kill what is left."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def watched(ranks: Ranks, fault: Callable[[Ranks], Iterable[int]], limit_s: float = LIMIT_S) -> dict[int, Ended]:
    """What became of the ranks that fault() names, from when it returns."""
    try:
        return ranks.watch(fault(ranks), limit_s)
    finally:
        ranks.end()
