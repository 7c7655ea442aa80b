"""Rounds of several providers on real ranks, and a journal of them that survives an interrupted run.

Every rank builds and checks each provider. The correct providers run once in every round, in an order that rotates by
one. A step is over when the last rank has finished it. Rank 0 writes every result at once, so that Ctrl-C, or a
provider that kills its process, loses no measurement.
"""

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fused_megatron.benchmarking.exact_results import MESSAGE_CHARACTERS
from fused_megatron.benchmarking.side_by_side import Comparison
from fused_megatron.benchmarking.timing_devices import CpuDevice
from fused_megatron.checks import first_line
from fused_megatron.kept_pages import keep_malloc_pages
from fused_megatron.testing import run_on_ranks
from fused_megatron.testing.run_on_ranks import RankError

Parts = dict[str, float]


class WrongResult(Exception):
    """A provider's result differs from the exact one."""


@dataclass
class Candidate:
    """A provider with correct results.

    Attributes:
        step: the timed function.
        peak_bytes: peak memory of this rank, since before the model was made.
        bubble: returns the seconds of the last step in which the pipeline schedule lets a rank idle; or None.
    """

    step: Callable[[], object]
    peak_bytes: int = 0
    bubble: Callable[[], float] | None = None


Builds = Mapping[str, Callable[[], Candidate]]


@dataclass
class Journal:
    """The journal of rank 0: a file with a line of JSON for each result."""

    path: Path | None

    def __call__(self, **entry: Any) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")


@dataclass
class Measured:
    """Contents of a journal, by provider: seconds of every round, peak bytes, parts of a step, or the fault."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    breakdown: dict[str, Parts] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    at: str | None = None

    def read(self, path: Path) -> None:
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a truncated line of a rank that was killed
                self._take(json.loads(line))

    def _take(self, entry: dict[str, Any]) -> None:
        self.at = entry.get("at", self.at)
        self.faults.update(entry.get("faults", {}))
        self.peak_bytes.update(entry.get("peak_bytes", {}))
        self.breakdown.update(entry.get("breakdown", {}))
        for name, seconds in entry.get("round", {}).items():
            self.seconds.setdefault(name, []).append(seconds)


def run_providers(
    on_rank: Callable[..., None], ranks: int, names: list[str], *args: Any, limit_s: float
) -> tuple[Measured, bool]:
    """Call on_rank(rank, ranks, journal, names, *args) on the ranks; return the measurements, and False after Ctrl-C.

    A provider that kills a rank is left out, and the others start again.
    """
    names, lost = list(names), {}
    while True:
        measured, over = Measured(faults=dict(lost)), True
        with tempfile.TemporaryDirectory(prefix="steps-on-ranks-") as folder:
            journal = Path(folder) / "journal"
            journal.touch()
            try:
                run_on_ranks(on_rank, ranks, str(journal), names, *args, timeout_s=limit_s)
            except KeyboardInterrupt:
                measured.read(journal)
                return measured, False
            except RankError as error:
                measured.read(journal)
                guilty = measured.at
                text = f"failed: {last_line(error)}"
                if guilty in names:
                    over = bool(measured.seconds)  # else again without this provider
                    names.remove(guilty)
                    lost[guilty] = measured.faults[guilty] = text
                else:
                    measured.faults.update(dict.fromkeys(names, text))
            else:
                measured.read(journal)
        if over or not names:
            return measured, True


def last_line(error: BaseException) -> str:
    """Return the last line of an error of ranks: the exception of the first rank, or how it died."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if not line.startswith("rank ") or "died" in line or "did not answer" in line]
    return (raised[-1] if raised else type(error).__name__)[:200]


def measure(rank: int, world_size: int, journal: str, builds: Builds, rounds: int) -> None:
    """On every rank: build and check the providers, time them, then measure the breakdown of a step."""
    say = Journal(Path(journal) if rank == 0 else None)
    candidates: dict[str, Candidate] = {}
    for name, build in builds.items():
        say(at=name)
        found, fault = try_out(build)
        # A fault of one rank counts for all, so that no rank waits for it in a collective.
        every: list[Any] = [None] * world_size
        dist.all_gather_object(every, (fault, found.peak_bytes if found else 0))
        fault = next((f for f, _ in every if f), None)
        if fault or found is None:
            say(faults={name: fault})
        else:
            candidates[name] = found
            say(peak_bytes={name: max(peak for _, peak in every)})
        if rank == 0:
            print(f"  {name}: {fault or 'right'}", flush=True)
    order = list(candidates)
    for i in range(rounds + 1 if order else 0):
        spent = {}
        for name in order[i % len(order) :] + order[: i % len(order)]:
            say(at=name)
            dist.barrier()
            spent[name] = CpuDevice().seconds(candidates[name].step)
        slowest = torch.tensor([spent[name] for name in order], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if i > 0:  # the first warms up
            say(round=dict(zip(order, slowest.tolist(), strict=True)))
        if i == 1 and rank == 0:
            print(f"  {rounds} rounds of {slowest.sum():.1f} s", flush=True)
    for name in order:
        say(at=name)
        say(breakdown={name: break_down(candidates[name], world_size, min(3, rounds))})
    say(at=None)


def start_rank(threads: int) -> None:
    """Set threads and malloc as our trainer does, for every provider, before the first large tensor."""
    keep_malloc_pages()
    torch.set_num_threads(threads)


def try_out(build: Callable[[], Candidate]) -> tuple[Candidate | None, str | None]:
    """Return the provider's candidate, or its fault."""
    found: list[Candidate] = []
    try:
        with silenced_stderr():  # warnings of the profiler and of other libraries
            peak = CpuDevice().peak_bytes(lambda: found.append(build()))
    except ImportError as error:
        return None, f"not installed ({first_line(error, name_type=False)[:MESSAGE_CHARACTERS]})"
    except WrongResult as error:
        return None, f"wrong: {error}; not timed"
    except Exception as error:
        return None, f"failed: {first_line(error)[:MESSAGE_CHARACTERS]}"
    found[0].peak_bytes = peak or 0
    return found[0], None


def break_down(candidate: Candidate, world_size: int, num_steps: int) -> Parts:
    """Return the seconds of a step in which a rank's thread computed (or was ready to), and in which it waited.

    They are means over the ranks in the fastest of a few steps, by the system's own count, the same for all providers.
    """
    steps = []
    optimizer = OptimizerClock()
    with optimizer:
        for _ in range(num_steps):
            dist.barrier()
            before, start, optimizer.seconds = waited_s(), time.perf_counter(), 0.0
            candidate.step()
            whole = time.perf_counter() - start
            waited = min(max(0.0, waited_s() - before), whole) if world_size > 1 else 0.0
            bubble = min(candidate.bubble(), waited) if candidate.bubble else 0.0
            rest = max(0.0, whole - waited - optimizer.seconds)
            steps.append([whole, rest, waited - bubble, bubble, optimizer.seconds])
    everywhere = torch.tensor(steps, dtype=torch.float64)
    dist.all_reduce(everywhere)
    _, compute, communication, bubble, update = min((everywhere / world_size).tolist())
    found = {"compute": compute, "communication": communication, "bubble": bubble, "optimizer": update}
    absent = {
        "communication": world_size == 1,
        "bubble": candidate.bubble is None,
        "optimizer": optimizer.seconds == 0.0,
    }
    return {part: seconds for part, seconds in found.items() if not absent.get(part)}


def waited_s() -> float:
    """Return seconds in which this thread neither ran nor waited for a core (Linux; elsewhere: did not run)."""
    now = time.perf_counter()
    with contextlib.suppress(OSError):
        on_core, in_want, _ = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
        return now - (int(on_core) + int(in_want)) / 1e9
    return now - time.thread_time()


class OptimizerClock:
    """A clock of the seconds in step() of any torch optimizer, including ours."""

    def __init__(self) -> None:
        self.seconds, self._start = 0.0, 0.0

    def __enter__(self) -> "OptimizerClock":
        self._hooks = [
            register_optimizer_step_pre_hook(lambda *_: self._begin()),
            register_optimizer_step_post_hook(lambda *_: self._end()),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self) -> None:
        self._start = time.perf_counter()

    def _end(self) -> None:
        self.seconds += time.perf_counter() - self._start


def fill(comparison: Comparison, measured: Measured, names: Mapping[str, str]) -> Comparison:
    """Fill the comparison with the measurements of its providers; names: from its names to the journal's."""
    for kind in ("seconds", "peak_bytes", "breakdown", "faults"):
        theirs = getattr(measured, kind)
        getattr(comparison, kind).update({mine: theirs[name] for name, mine in names.items() if name in theirs})
    return comparison


@contextlib.contextmanager
def silenced_stderr() -> Iterator[None]:
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
