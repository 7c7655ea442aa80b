"""Host process of run_on_ranks: it imports torch once and forks the ranks of every call from itself.

Importing torch takes seconds per process, forking a process with torch takes milliseconds. So each call gets new ranks,
and nothing that one test leaves behind (process groups, RNG state, a dead rank) reaches the next.
"""

import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import torch
import torch._dynamo  # optimizers and dispatch modes import it on first use, which would cost every rank time
import torch.distributed as dist


@dataclass(frozen=True)
class Call:
    """One call of run_on_ranks, sent by the parent."""

    module_name: str
    module_path: str
    qualified_name: str
    arguments: bytes  # pickled; only the ranks unpickle them, after loading the module that they may refer to
    world_size: int
    store_path: str
    backend: str
    timeout_s: float
    in_turn: bool  # whether the arguments are cases, each for one call of the function
    preload: tuple[tuple[str, str], ...] = ()  # names and paths of further modules that the ranks will need


class NotMetError(RuntimeError):
    """The ranks could not form their process group, so that no rank has called the function."""


def main() -> None:
    """Entry point; the argument is the descriptor of the control socket."""
    torch.set_num_threads(1)  # several ranks share the cores, and no other thread may run here during a fork
    serve(socket.socket(fileno=int(sys.argv[1])))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and triton's bindings would list at the end what they leaked


def serve(control: socket.socket) -> None:
    """Serve one call after another, forking its ranks, until the parent closes its end or dies."""
    channel = Connection(os.dup(control.fileno()))
    ranks: dict[int, int] = {}
    try:
        while True:
            byte, descriptors, _, _ = socket.recv_fds(control, 1, 256)
            if not byte:
                return
            call: Call = channel.recv()
            for name, path in ((call.module_name, call.module_path), *call.preload):
                with contextlib.suppress(BaseException):  # each rank loads the module again and reports errors
                    load_module(name, path)
            gc.freeze()  # garbage collection in a rank would write to, and so copy, pages shared with this process
            ranks = {rank: _fork_rank(rank, call, descriptors) for rank in range(call.world_size)}
            for descriptor in descriptors:
                os.close(descriptor)
            channel.send(None)  # all ranks have started
            while (stuck := channel.recv()) is not None:
                _show_stacks([ranks[rank] for rank in stuck])
                channel.send(None)
            channel.send(_end(ranks))
            ranks = {}
    except (EOFError, OSError):
        return
    finally:
        _end(ranks)


def _show_stacks(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.1)  # one after the other, so that the stacks do not mix


def load_module(name: str, path: str) -> ModuleType:
    """Import a module by name if that finds this file, else by path (pytest's importlib mode, scripts)."""
    name = "__mp_main__" if name == "__main__" else name  # multiprocessing's alias, by which both sides can pickle
    loaded = sys.modules.get(name)
    if loaded is not None and _is_file(getattr(loaded, "__file__", None), path):
        return loaded
    with contextlib.suppress(ImportError, ValueError):
        found = importlib.util.find_spec(name)
        if found is not None and _is_file(found.origin, path):
            return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_file(origin: str | None, path: str) -> bool:
    return origin is not None and os.path.exists(origin) and os.path.samefile(origin, path)


def _end(ranks: dict[int, int]) -> dict[int, int]:
    """Kill the ranks and all processes that they started; return exit codes by rank, negative for a signal."""
    for pid in ranks.values():
        # The pid still belongs to the rank, since it was not reaped. The rank may not have created its group yet.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    return {rank: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for rank, pid in ranks.items()}


def _fork_rank(rank: int, call: Call, descriptors: list[int]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            _run_rank(rank, call, descriptors)
        finally:
            os._exit(70)  # reached only if the parent is gone; the host's own clean-up must not run here
    return pid


def _run_rank(rank: int, call: Call, descriptors: list[int]) -> None:
    os.setpgid(0, 0)
    *answers, stdout, stderr = descriptors
    os.dup2(stdout, 1)  # the parent's current output: pytest's capture of this test
    os.dup2(stderr, 2)
    for other in {*answers} - {answers[rank]}:
        os.close(other)  # otherwise a dead rank's end stays open here, and the parent does not notice
    channel = Connection(answers[rank])
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=False)
    doing: list[Any] = []
    try:
        answer = pickle.dumps(("result", _call(rank, call, doing)))
    except BaseException as error:
        answer = _error_answer(error, "".join(f"case {case!r}:\n" for case in doing[-1:]))
    sys.stdout.flush()
    sys.stderr.flush()
    channel.send_bytes(answer)
    while True:  # an exit would close sockets that other ranks may still read; the host ends all ranks at once
        signal.pause()


def _call(rank: int, call: Call, doing: list[Any]) -> Any:
    """Call the function and return its result; with cases, call it for each, appended to `doing`, and return a list."""
    module = load_module(call.module_name, call.module_path)
    fn: Any = module
    for name in call.qualified_name.split("."):
        fn = getattr(fn, name)
    arguments = pickle.loads(call.arguments)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(call.world_size))
    timeout = timedelta(seconds=call.timeout_s)
    store = dist.FileStore(call.store_path, call.world_size)
    try:
        dist.init_process_group(call.backend, store=store, rank=rank, world_size=call.world_size, timeout=timeout)
    except RuntimeError as error:
        raise NotMetError(str(error)) from error
    if not call.in_turn:
        return fn(rank, call.world_size, *arguments)
    results = []
    for case in arguments:
        doing.append(case)
        results.append(fn(rank, call.world_size, *case))
    return results


def _error_answer(error: BaseException, case: str) -> bytes:
    text = case + traceback.format_exc()
    try:
        answer = pickle.dumps(("error", error, text))
        pickle.loads(answer)  # some exceptions can be pickled but not unpickled
        return answer
    except Exception:
        return pickle.dumps(("error", None, text))
