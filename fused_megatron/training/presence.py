"""Which ranks are gone, silent or late: known within seconds, by whoever waited for them in vain."""

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

# For the system to close the ports of a process that was just killed.
_SETTLE_S = 1.0
# A rank that lives answers within this time, on a busy machine too.
_ANSWER_S = 3.0
_AGAIN_S = 0.1
_MOST_BYTES = 4096
_MOST_CONNECTIONS = 400
_NAMED = 8
_WATCH_S = 1.0
# What a phase of the run may last in which ranks wait for one of them, who lives.
_PHASE_S = 1800.0
_GONE, _SILENT = "gone", "silent"

# What gloo, NCCL and our own transports say when another rank is gone or silent.
_LOST_CONTACT = re.compile(
    "gloo|nccl|connection (closed|reset|refused)|timed out|timeout|socket|broken pipe|shared memory|"
    "another rank stopped",
    re.IGNORECASE,
)
_SOURCE = re.compile(r"\[/\S+:\d+\] ")
_TIME_OUT = re.compile("timed out|timeout|did not come within", re.IGNORECASE)
# A rank that has one of these below what it does waits for others.
_WAITS = ("observe/waits.py", "transport/host_ring.py", "torch/distributed/")


class LostRankError(RuntimeError):
    """Ranks of the run are gone, silent or late.

    Attributes:
        ranks: which.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


def lost_contact(error: Exception) -> bool:
    """Whether the error says that another rank did not do its part."""
    return isinstance(error, LostRankError) or _LOST_CONTACT.search(str(error)) is not None


def reason_of(error: Exception) -> str:
    """The error in 200 characters of one line, without the places in its own sources that gloo begins with."""
    return _SOURCE.sub("", " ".join(str(error).split()))[:200]


class Presence:
    """A port of this process, where a thread tells the other ranks that it lives and what it does.

    A killed rank breaks only the connections of its neighbours; what they break by leaving is all that the others see.
    So a rank that leaves because of an error tells every other rank before it goes. After an error, a rank whose port
    is closed and that told nothing is gone; one that does not answer is silent (stopped, stuck or cut off); one that
    answers and waits for nobody, while others waited too long, is late.

    Each rank also watches the next one. So a phase of the run in which ranks rightly wait long for one of them (a slow
    disk, text that one machine prepares) needs no time-out: the default group waits up to half an hour, and a rank that
    gives no sign of life for timeout_s ends the run all the same, with one line on every other rank.

    Args:
        timeout_s: how long the next rank may give no sign of life; None: nobody is watched, and the default group waits
            as before.

    Communication: two all-gathers at the start; a short message to the next rank every second; after an error one to
    every other rank.
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
        told = gather_json([host, port, secrets.token_hex(8)], dist.group.WORLD)
        self._others = {rank: (each[0], each[1]) for rank, each in enumerate(told) if rank != self._rank}
        self._word = told[0][2]  # strangers who reach the port do not know it
        threading.Thread(target=self._serve, daemon=True, name="presence").start()
        if timeout_s is not None and self._others:
            _let_wait(dist.group.WORLD, max(timeout_s, _PHASE_S))
            threading.Thread(target=self._watch, args=(timeout_s,), daemon=True, name="presence-watch").start()

    def close(self) -> None:
        """This rank ends well: whoever watches it need not any more."""
        self._closed.set()
        if self._others:
            self._leaves = self._leaves or "done"
            self._ask([(self._rank - 1) % (len(self._others) + 1)])

    def explain(self, error: Exception) -> Exception:
        """A LostRankError where other ranks are to blame, else the error itself; called before a rank ends with it.

        Takes up to 4 s where all others live, and then no longer than the slowest answer.
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
            return LostRankError(f"lost contact with {_names(lost)} ({reason}{self._last(silent, found)})", tuple(lost))
        if not lost_contact(error):
            return error
        late = {rank: state for rank, state in found.items() if not isinstance(state, str) and not state["waits"]}
        late = {rank: state for rank, state in late.items() if rank not in self._left and state["left"] is None}
        if late and _TIME_OUT.search(str(error)):
            does = "; ".join(f"rank {rank} is in {state['does']}" for rank, state in list(late.items())[:_NAMED])
            return LostRankError(f"{_names(late)} did not come in time: {does} ({reason})", tuple(late))
        # Those that wait lost contact themselves; whoever left with an error of its own began it.
        began = {rank: text for rank, text in self._left.items() if not _LOST_CONTACT.search(text)}
        if began:
            rank, text = next(iter(sorted(began.items())))
            return LostRankError(f"rank {rank} ended with an error: {text}", tuple(sorted(began)))
        return error

    def _last(self, silent: list[int], found: dict[int, Any]) -> str:
        """Of ranks that are silent, what those that watched them saw last."""
        if not silent:
            return ""
        saw = dict(self._saw)
        for state in found.values():
            saw |= {} if isinstance(state, str) else {int(rank): does for rank, does in state["saw"].items()}
        last = [f"; rank {rank} was last in {saw[rank]}" for rank in silent if rank in saw][:_NAMED]
        verb = "gives" if len(silent) == 1 else "give"
        return f"; {_names(silent)} {verb} no sign of life: stopped, stuck or cut off{''.join(last)}"

    def _ask(self, ranks: Iterable[int], lost: str | None = None) -> dict[int, Any]:
        """What some ranks answer; _GONE or _SILENT where one does not.

        They are told why this rank leaves, and which other is lost.
        """
        told = {"word": self._word, "rank": self._rank, "left": self._leaves, "lost": lost}
        message = json.dumps(told).encode() + b"\n"
        ranks = list(ranks)

        async def ask_all() -> list[Any]:
            at_once = asyncio.Semaphore(_MOST_CONNECTIONS)
            return await asyncio.gather(*(_answer(self._others[rank], message, at_once) for rank in ranks))

        return dict(zip(ranks, asyncio.run(ask_all()), strict=True))

    def _watch(self, timeout_s: float) -> None:
        """End this rank, and all others, when the next one gives no sign of life."""
        watched = (self._rank + 1) % (len(self._others) + 1)
        silent_s = 0.0
        while not self._closed.wait(_WATCH_S):
            begun = time.monotonic()
            (state,) = self._ask([watched]).values()
            if watched in self._left or self._leaves is not None:
                return
            # No round counts for more than it may last: this process may have been stopped itself.
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
        """End this process with a line, unless its own thread finds out and ends it; tell the others who is lost."""
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
            # A stranger's bytes, or a rank that is gone meanwhile.
            with connection, contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                connection.settimeout(1.0)
                asked = json.loads(connection.makefile("rb").readline(_MOST_BYTES))
                if asked.get("word") != self._word:
                    continue
                if asked.get("left") is not None and asked.get("rank") in self._others:
                    self._left[asked["rank"]] = str(asked["left"])
                connection.sendall(json.dumps(self._state()).encode())
                if asked.get("lost") is not None:
                    text = str(asked["lost"])[:400]
                    threading.Thread(target=self._end, args=(text,), daemon=True, name="presence-end").start()

    def _state(self) -> dict[str, Any]:
        frame = sys._current_frames().get(self._watched)
        waits, does = (False, "nothing") if frame is None else _describe(frame)
        return {"left": self._leaves, "waits": waits, "does": does, "saw": self._saw}


def _let_wait(group: dist.ProcessGroup | None, timeout_s: float) -> None:
    """Of gloo only: NCCL's collectives are of the axes, which keep their own time-outs."""
    assert group is not None
    for device in group._device_types:
        backend = group._get_backend(device)
        if backend.name() == "gloo":
            backend._set_default_timeout(timedelta(seconds=timeout_s))


async def _answer(address: tuple[str, int], message: bytes, at_once: asyncio.Semaphore) -> Any:
    """What a rank answers; _GONE where its port is closed, _SILENT where no answer comes.

    A connection that is cut says nothing: a busy rank that took it gives up before it has read what was asked.
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
    """Whether a thread waits for other ranks, and the innermost named function outside of torch that it is in."""
    torch_folder = str(Path(torch.__file__).parent)
    waits, does, at = False, "", frame
    while at is not None:
        path = at.f_code.co_filename
        waits = waits or any(part in path for part in _WAITS)
        name = at.f_code.co_name
        if not does and not name.startswith("<") and not path.startswith(("<", torch_folder)):
            does = f"{name} ({'/'.join(Path(path).parts[-2:])}:{at.f_lineno})"
        at = at.f_back  # type: ignore[assignment]
    return waits, does or frame.f_code.co_name


def _names(ranks: Any) -> str:
    ranks = sorted(ranks)
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_NAMED]))}{more}"


def _own_address() -> str:
    """Of the interface that leads to the others."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
