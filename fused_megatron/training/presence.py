"""Detection of ranks that are gone, silent or late, within seconds, by the ranks that wait for them."""

import asyncio
import contextlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from fused_megatron.checks import first_line
from fused_megatron.collectives.together import gather_json
from fused_megatron.training.error_line import end_now
from fused_megatron.training.process_group import PHASE_S

# Time for the system to close the ports of a killed process.
_SETTLE_S = 1.0
# A living rank answers within this time, even on a busy machine.
_ANSWER_S = 3.0
_AGAIN_S = 0.1
_MOST_BYTES = 4096
_MOST_CONNECTIONS = 400
_NAMED = 8
_WATCH_S = 1.0
_GONE, _SILENT = "gone", "silent"

# Error texts of gloo, NCCL and our own transports when another rank is gone or silent.
_LOST_CONTACT = re.compile(
    "gloo|nccl|connection (closed|reset|refused)|timed out|timeout|socket|broken pipe|shared memory|"
    "another rank stopped",
    re.IGNORECASE,
)
_SOURCE = re.compile(r"\[/\S+:\d+\] ")
_TIME_OUT = re.compile("timed out|timeout|did not come within", re.IGNORECASE)
# A thread with one of these files on its stack waits for other ranks.
_WAITS = ("observe/waits.py", "transport/host_ring.py", "torch/distributed/")


class LostRankError(RuntimeError):
    """Ranks of the run are gone, silent or late.

    Attributes:
        ranks: numbers of these ranks.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


def lost_contact(error: Exception) -> bool:
    """Return whether the error means that another rank did not do its part."""
    return isinstance(error, LostRankError) or _LOST_CONTACT.search(str(error)) is not None


def reason_of(error: Exception) -> str:
    """Return the error as one line of at most 200 characters, without the source locations that gloo puts first."""
    return _SOURCE.sub("", " ".join(str(error).split()))[:200]


class Presence:
    """Port of this process, at which a thread tells the other ranks that this rank lives and what it does.

    A killed rank breaks only the connections of its neighbours; the other ranks see only that the neighbours leave.
    Therefore a rank that leaves with an error tells every other rank before. After an error, a rank is gone if its port
    is closed and it told nothing. It is silent (stopped, stuck or cut off) if it does not answer. It is late if it
    answers and waits for no other rank, while others waited too long for it.

    Each rank also watches the next one. Therefore a phase in which ranks rightly wait long for one rank (a slow disk,
    text that one machine prepares) needs no short time-out: the default group waits up to half an hour. A rank without
    a sign of life for timeout_s still ends the run, with one line on every other rank.

    Args:
        timeout_s: seconds that the next rank may give no sign of life. None: no rank is watched, and the time-out of
            the default group does not change.

    Communication: two all-gathers at the start; a short message to the next rank every second; after an error one
    message to every other rank.
    """

    def __init__(self, timeout_s: float | None = None) -> None:
        self._others: dict[int, tuple[str, int]] = {}
        self._left: dict[int, str] = {}
        self._saw: dict[int, str] = {}
        self._leaves: str | None = None
        self._closed = threading.Event()
        if not dist.is_initialized():
            return
        self._rank = dist.get_rank()
        self._watched = threading.get_ident()
        self._listener = socket.create_server((_own_address(), 0), backlog=4096)
        host, port = self._listener.getsockname()[:2]
        ports = gather_json([host, port, secrets.token_hex(8)], dist.group.WORLD)
        self._others = {rank: (each[0], each[1]) for rank, each in enumerate(ports) if rank != self._rank}
        self._token = ports[0][2]  # proves that a message comes from a rank of this run
        threading.Thread(target=self._serve, daemon=True, name="presence").start()
        if timeout_s is not None and self._others:
            _let_wait(dist.group.WORLD, max(timeout_s, PHASE_S))
            threading.Thread(target=self._watch, args=(timeout_s,), daemon=True, name="presence-watch").start()

    def close(self) -> None:
        """End the watch: this rank ends without an error, and tells so the rank that watches it."""
        self._closed.set()
        if self._others:
            self._leaves = self._leaves or "done"
            self._ask([(self._rank - 1) % (len(self._others) + 1)])

    def explain(self, error: Exception) -> Exception:
        """Return a LostRankError if other ranks caused the error, else the error itself.

        Call it before a rank ends with the error. It takes up to 4 s if all other ranks live, then only the time of the
        slowest answer.
        """
        if not self._others:
            return error
        self._leaves = first_line(error)[:200]
        reason = reason_of(error)
        deadline = time.monotonic() + _SETTLE_S
        while True:
            found = self._ask(self._others)
            lost = {rank: state for rank, state in found.items() if isinstance(state, str) and rank not in self._left}
            if lost or time.monotonic() > deadline or not lost_contact(error):
                break
            time.sleep(0.3)
        if lost:
            silent = [rank for rank, state in lost.items() if state == _SILENT]
            last = self._last_actions(silent, found)
            return LostRankError(f"lost contact with {_names(lost)} ({reason}{last})", tuple(lost))
        if not lost_contact(error):
            return error
        late = {rank: state for rank, state in found.items() if not isinstance(state, str) and not state["waits"]}
        late = {rank: state for rank, state in late.items() if rank not in self._left and state["left"] is None}
        if late and _TIME_OUT.search(str(error)):
            does = "; ".join(f"rank {rank} is in {state['does']}" for rank, state in list(late.items())[:_NAMED])
            return LostRankError(f"{_names(late)} did not come in time: {does} ({reason})", tuple(late))
        # Ranks that wait have lost contact themselves. The cause is a rank that left with an error of another kind.
        causes = {rank: text for rank, text in self._left.items() if not _LOST_CONTACT.search(text)}
        if causes:
            rank, text = next(iter(sorted(causes.items())))
            return LostRankError(f"rank {rank} ended with an error: {text}", tuple(sorted(causes)))
        return error

    def _last_actions(self, silent: list[int], found: dict[int, Any]) -> str:
        """Describe what each silent rank did last, as seen by the rank that watched it."""
        if not silent:
            return ""
        saw = dict(self._saw)
        for state in found.values():
            saw |= {} if isinstance(state, str) else {int(rank): does for rank, does in state["saw"].items()}
        last = [f"; rank {rank} was last in {saw[rank]}" for rank in silent if rank in saw][:_NAMED]
        verb = "gives" if len(silent) == 1 else "give"
        return f"; {_names(silent)} {verb} no sign of life: stopped, stuck or cut off{''.join(last)}"

    def _ask(self, ranks: Iterable[int], lost: str | None = None) -> dict[int, Any]:
        """Ask ranks for their state; return it by rank, _GONE or _SILENT for a rank that does not answer.

        The message also tells them why this rank leaves, if it does, and that another rank is lost, if `lost` is given.
        """
        question = {"token": self._token, "rank": self._rank, "left": self._leaves, "lost": lost}
        message = json.dumps(question).encode() + b"\n"
        ranks = list(ranks)

        async def ask_all() -> list[Any]:
            at_once = asyncio.Semaphore(_MOST_CONNECTIONS)
            return await asyncio.gather(*(_answer(self._others[rank], message, at_once) for rank in ranks))

        return dict(zip(ranks, asyncio.run(ask_all()), strict=True))

    def _watch(self, timeout_s: float) -> None:
        """End this rank and all others if the next rank gives no sign of life."""
        watched = (self._rank + 1) % (len(self._others) + 1)
        silent_s = 0.0
        while not self._closed.wait(_WATCH_S):
            begun = time.monotonic()
            (state,) = self._ask([watched]).values()
            if watched in self._left or self._leaves is not None:
                return
            # A round counts at most its longest duration: this process itself may have been stopped.
            silent_s += min(time.monotonic() - begun, _ANSWER_S) + _WATCH_S
            if not isinstance(state, str):
                silent_s = 0.0
                self._saw[watched] = state["does"]
            elif state == _GONE and silent_s > _SETTLE_S:
                self._end(f"lost contact with rank {watched}", lost=watched)
            elif silent_s > timeout_s:
                self._end(
                    f"lost contact with rank {watched} (it gave no sign of life for {timeout_s:g} s: stopped, stuck or "
                    f"cut off; it was last in {self._saw.get(watched, 'nothing that is known')})",
                    lost=watched,
                )

    def _end(self, text: str, *, lost: int | None = None) -> None:
        """End this process with a line, unless its main thread ends it first; tell the others which rank is lost."""
        deadline = time.monotonic() + _ANSWER_S
        if lost is not None:
            self._ask([rank for rank in self._others if rank != lost], lost=text)
        while time.monotonic() < deadline:
            if self._leaves is not None or self._closed.wait(0.1):
                return
        end_now(f"{text}; the same command resumes from the newest good checkpoint", self._rank)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            # Bytes of another program, or a rank that has gone meanwhile.
            with connection, contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                connection.settimeout(1.0)
                question = json.loads(connection.makefile("rb").readline(_MOST_BYTES))
                if question.get("token") != self._token:
                    continue
                if question.get("left") is not None and question.get("rank") in self._others:
                    self._left[question["rank"]] = str(question["left"])
                connection.sendall(json.dumps(self._state()).encode())
                if question.get("lost") is not None:
                    text = str(question["lost"])[:400]
                    threading.Thread(target=self._end, args=(text,), daemon=True, name="presence-end").start()

    def _state(self) -> dict[str, Any]:
        frame = sys._current_frames().get(self._watched)
        waits, does = (False, "nothing") if frame is None else _describe(frame)
        return {"left": self._leaves, "waits": waits, "does": does, "saw": self._saw}


def _let_wait(group: dist.ProcessGroup | None, timeout_s: float) -> None:
    """Set the time-out of a group, for gloo only: NCCL's collectives belong to the axes, which keep their time-outs."""
    assert group is not None
    for device in group._device_types:
        backend = group._get_backend(device)
        if backend.name() == "gloo":
            backend._set_default_timeout(timedelta(seconds=timeout_s))


async def _answer(address: tuple[str, int], message: bytes, at_once: asyncio.Semaphore) -> Any:
    """Send a message to a rank; return its answer, _GONE if its port is closed, _SILENT if no answer comes.

    If the connection is cut, ask again: a busy rank may accept a connection and give up before it has read the message.
    """

    async def talk() -> bytes:
        reader, writer = await asyncio.open_connection(*address)
        try:
            writer.write(message)
            return await reader.read()
        finally:
            writer.close()

    async def ask() -> Any:
        while True:
            with contextlib.suppress(BrokenPipeError, ConnectionAbortedError, ConnectionResetError):
                answer = await talk()
                if answer:
                    return json.loads(answer)
            await asyncio.sleep(_AGAIN_S)

    async with at_once:
        try:
            return await asyncio.wait_for(ask(), _ANSWER_S)
        except ConnectionRefusedError:
            return _GONE
        except (OSError, asyncio.TimeoutError, ValueError):
            return _SILENT


def _describe(frame: FrameType) -> tuple[bool, str]:
    """Return whether a thread waits for other ranks, and its innermost named function outside of torch."""
    torch_folder = str(Path(torch.__file__).parent)
    waits = False
    does = ""
    caller: FrameType | None = frame
    while caller is not None:
        path = caller.f_code.co_filename
        waits = waits or any(part in path for part in _WAITS)
        name = caller.f_code.co_name
        if not does and not name.startswith("<") and not path.startswith(("<", torch_folder)):
            does = f"{name} ({'/'.join(Path(path).parts[-2:])}:{caller.f_lineno})"
        caller = caller.f_back
    return waits, does or frame.f_code.co_name


def _names(ranks: Any) -> str:
    ranks = sorted(ranks)
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_NAMED]))}{more}"


def _own_address() -> str:
    """Return the address of the network interface that leads to the other ranks."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
