"""run_on_ranks: runs a function on several real ranks (gloo processes on this machine) and collects the results."""

import atexit
import inspect
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from fused_megatron.checks import check
from fused_megatron.testing import rank_host

# Time for errors of other ranks to arrive after the first failure: the others usually hang in a collective.
GRACE_S = 3.0

# Attempts to form the process group of a call.
_ATTEMPTS = 3

# Time for the host to import torch and the function's module; it does not count as part of the call's timeout.
START_S = 180.0

# Sets the parent's import path before importing the package: the ranks must run the same code as the parent.
_START = "import sys; sys.path[:] = sys.argv[2:]; from fused_megatron.testing import rank_host; rank_host.main()"
_LOCK = threading.Lock()


class RankError(RuntimeError):
    """Failure of one or more ranks.

    Attributes:
        errors: by rank, the exception that it raised (None if it could not be pickled).
        silent: the ranks that did not answer.
    """

    def __init__(self, message: str, errors: dict[int, BaseException | None], silent: tuple[int, ...]) -> None:
        super().__init__(message)
        self.errors = errors
        self.silent = silent


def run_on_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 180.0,
    backend: str = "gloo",
    preload: Sequence[tuple[str, str]] = (),
) -> list[Any]:
    """Call fn(rank, world_size, *args) on world_size new processes that form the default process group.

    Each process has one thread, and the working folder and environment of the first call. No process is left when this
    returns or raises.

    Args:
        fn: a function at the top level of a module (also of a pytest test module, which is loaded by its path).
        world_size: number of ranks.
        *args: the same for every rank; pickled.
        timeout_s: time for the call without imports. Ranks that have not answered by then print their Python stacks and
            are killed.
        backend: backend of torch.distributed.
        preload: (name, path) of modules to load once for all ranks, beside the module of fn.

    Returns:
        The results of fn, by rank.

    Raises:
        RankError: ranks raised (with tracebacks), died (with exit codes) or did not answer.
    """
    return _run(fn, world_size, args, timeout_s, backend, in_turn=False, preload=preload)


def run_cases_on_ranks(
    fn: Callable[..., Any], world_size: int, cases: Iterable[tuple[Any, ...]], timeout_s: float = 180.0
) -> list[list[Any]]:
    """Call fn(rank, world_size, *case) for one case after another on the same ranks; new ranks cost 0.1 s each.

    State that a case leaves in its process (RNG, process groups) is visible to the next case.

    Args:
        fn: as in run_on_ranks.
        world_size: number of ranks.
        cases: the other arguments of each call; pickled.
        timeout_s: time for all cases together.

    Returns:
        For each case the results of fn, by rank.

    Raises:
        RankError: as in run_on_ranks; the message names the case above each traceback.
    """
    by_rank = _run(fn, world_size, tuple(cases), timeout_s, "gloo", in_turn=True)
    return [list(results) for results in zip(*by_rank, strict=True)]


def check_sent_to_ranks(value: Any) -> None:
    """Raise, what depends on the value, if run_on_ranks cannot send it as an argument."""
    pickle.dumps(value)


def _run(
    fn: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    timeout_s: float,
    backend: str,
    in_turn: bool,
    preload: Sequence[tuple[str, str]] = (),
) -> list[Any]:
    check(world_size >= 1, f"world_size={world_size} must be at least 1")
    name = getattr(fn, "__qualname__", fn)
    check(
        inspect.isfunction(fn) and "<" not in fn.__qualname__,
        f"fn={name} must be a function at the top level of a module (the ranks load it by name)",
    )
    arguments = pickle.dumps(args)
    for _ in range(_ATTEMPTS - 1):
        try:
            return _run_once(fn, world_size, arguments, timeout_s, backend, in_turn, preload)
        except RankError as error:
            # On a busy machine gloo sometimes closes a connection while the ranks connect: try again.
            if not any(isinstance(each, rank_host.NotMetError) for each in error.errors.values()):
                raise
    return _run_once(fn, world_size, arguments, timeout_s, backend, in_turn, preload)


def _run_once(
    fn: Callable[..., Any],
    world_size: int,
    arguments: bytes,
    timeout_s: float,
    backend: str,
    in_turn: bool,
    preload: Sequence[tuple[str, str]],
) -> list[Any]:
    # A FileStore: a TCPStore looks up the name of 127.0.0.1, which may take 5 s without a result.
    with _LOCK, tempfile.TemporaryDirectory(prefix="run-on-ranks-") as folder:
        host = _running_host()
        call = rank_host.Call(
            module_name=fn.__module__,
            module_path=os.path.abspath(inspect.getfile(fn)),
            qualified_name=fn.__qualname__,
            arguments=arguments,
            world_size=world_size,
            store_path=os.path.join(folder, "store"),
            backend=backend,
            timeout_s=timeout_s,
            in_turn=in_turn,
            preload=tuple(preload),
        )
        return host.run(call)


class _Host:
    """The parent's end of the host process."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.control, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs.fileno()), *sys.path],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches only this process, which then ends the ranks
        )
        theirs.close()
        self.channel = Connection(os.dup(self.control.fileno()))

    def run(self, call: rank_host.Call) -> list[Any]:
        pairs = [socket.socketpair() for _ in range(call.world_size)]
        channels = [Connection(ours.detach()) for ours, _ in pairs]
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            descriptors = [theirs.fileno() for _, theirs in pairs]
            socket.send_fds(self.control, [b"r"], [*descriptors, 1, 2])
            self.channel.send(call)
            for _, theirs in pairs:
                theirs.close()
            if not self.channel.poll(START_S):
                raise RankError(f"the host of the ranks did not start within {START_S:g} s", {}, ())
            self.channel.recv()
            answers, died = _collect(channels, call.timeout_s)
            silent = tuple(rank for rank in range(call.world_size) if rank not in answers and rank not in died)
            if silent and not died and all(kind == "result" for kind, *_ in answers.values()):
                self.channel.send(silent)  # the ranks that hang print their stacks
                self.channel.recv()
            self.channel.send(None)
            exit_codes = self.channel.recv()
        except BaseException:
            self.close()  # also after Ctrl-C: a host with an unfinished call cannot be reused
            raise
        finally:
            for channel in channels:
                channel.close()
        return _judge(call, answers, {rank: exit_codes[rank] for rank in died}, silent)

    def close(self) -> None:
        """Close the connection: the host then ends its ranks and itself."""
        if os.getpid() == self.owner:
            self.channel.close()
            self.control.close()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGKILL)
                self.process.wait()


def _collect(channels: list[Connection], timeout_s: float) -> tuple[dict[int, tuple[Any, ...]], set[int]]:
    """Return the answers by rank and the ranks that died; every other rank was still running at the timeout."""
    pending = {channel: rank for rank, channel in enumerate(channels)}
    answers: dict[int, tuple[Any, ...]] = {}
    died: set[int] = set()
    deadline = time.monotonic() + timeout_s
    while pending:
        ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for channel in ready:
            assert isinstance(channel, Connection)
            rank = pending.pop(channel)
            try:
                answers[rank] = pickle.loads(channel.recv_bytes())
            except (EOFError, OSError):
                died.add(rank)
            if rank in died or answers[rank][0] == "error":
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return answers, died


def _judge(
    call: rank_host.Call, answers: dict[int, tuple[Any, ...]], died: dict[int, int], silent: tuple[int, ...]
) -> list[Any]:
    failed = {rank: answer[1:] for rank, answer in sorted(answers.items()) if answer[0] == "error"}
    if not (failed or died or silent):
        return [answers[rank][1] for rank in range(call.world_size)]
    parts = [f"{call.qualified_name} on {call.world_size} ranks:"]
    parts += [f"rank {rank} raised:\n{text.rstrip()}" for rank, (_, text) in failed.items()]
    parts += [f"rank {rank} died with exit code {code}" for rank, code in sorted(died.items())]
    if silent:
        names = ", ".join(map(str, silent))
        why = f"{GRACE_S:g} s after the first failure" if failed or died else f"timeout_s={call.timeout_s:g}"
        parts.append(f"rank {names} did not answer within {why} and was killed")
    errors = {rank: error for rank, (error, _) in failed.items()}
    raise RankError("\n".join(parts), errors, silent) from next(filter(None, errors.values()), None)


_host: _Host | None = None


def _running_host() -> _Host:
    global _host
    if _host is None or _host.owner != os.getpid() or _host.control.fileno() < 0 or _host.process.poll() is not None:
        _host = _Host()
        atexit.register(_host.close)
    return _host
