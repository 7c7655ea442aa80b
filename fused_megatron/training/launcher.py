"""The command `fused-megatron launch`, which starts the ranks of this machine and passes signals on to them."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fused_megatron.checks import InputError, SharedInputError
from fused_megatron.training.stop_request import LAUNCHER_VARIABLE, SIGNALS

USAGE = """usage: fused-megatron launch --nproc-per-node N COMMAND ...

Start N ranks of a command (train, generate, evaluate or convert) on this machine, as torchrun does. SIGTERM, Ctrl-C,
SIGHUP and SIGUSR1 reach every rank once: a training run then saves and ends, and this command ends with exit code 0.
On several machines: torchrun -m fused_megatron COMMAND ..., or
  fused-megatron launch slurm|kubernetes CONFIG.toml --nodes N    print the file for a cluster (--help: its options)"""

STORE_VARIABLE = "FUSED_MEGATRON_STORE"
"""Variable with the path of the file by which ranks of one machine find each other."""

_COMMANDS = ("train", "generate", "evaluate", "convert")
_LOOK_S = 0.05
# Time after the failure of one rank for the other ranks to report it and end.
_GRACE_S = 10.0
# Time after that for SIGTERM to end them, before SIGKILL.
_SIGTERM_S = 10.0


def launch(arguments: Sequence[str]) -> int:
    """Run `--nproc-per-node N COMMAND ...`; return the exit code of the command.

    Raises:
        InputError: the arguments have another form.
    """
    if any(argument in ("-h", "--help") for argument in arguments[:1]):
        print(USAGE)
        return 0
    num_ranks, command = parse_arguments(list(arguments))
    return run_ranks(num_ranks, [sys.executable, "-m", "fused_megatron", *command])


def parse_arguments(arguments: list[str]) -> tuple[int, list[str]]:
    """Return the number of ranks, and the command with its arguments.

    Raises:
        InputError: the arguments have another form.
    """
    option, _, value = (arguments or [""])[0].partition("=")
    rest = arguments[1:]
    if option.replace("_", "-") != "--nproc-per-node":
        raise InputError(
            "launch needs the number of ranks first: launch --nproc-per-node 2 train CONFIG.toml (on a cluster: launch "
            "slurm or kubernetes CONFIG.toml --nodes 8)"
        )
    if not value:
        value, rest = (rest or [""])[0], rest[1:]
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"--nproc-per-node={value} must be a number of ranks, 1 or more")
    if not rest or rest[0] not in _COMMANDS:
        raise InputError(f"launch starts ranks of one of {', '.join(_COMMANDS)}, not of {(rest or ['nothing'])[0]!r}")
    return int(value), rest


def run_ranks(num_ranks: int, command: Sequence[str], *, grace_s: float = _GRACE_S) -> int:
    """Start num_ranks processes of the command, each with its rank in the environment, and wait for them.

    Each rank leads a session of its own, so that signals of the terminal reach it only through this process.

    Args:
        num_ranks: number of ranks.
        command: the program and its arguments.
        grace_s: seconds that the other ranks have to end by themselves after one failed.

    Returns:
        0 if every rank ended with 0; else the code of the first rank that did not (128 + signal if a signal ended it).
    """
    came: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    ranks: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="fused-megatron-") as folder:
        try:
            for rank in range(num_ranks):
                environment = _environment(rank, num_ranks, Path(folder) / "store")
                ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
            return _wait(ranks, came, grace_s)
        finally:
            for process in ranks:  # still running only after an error in this process
                process.kill()
                process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)


def _environment(rank: int, num_ranks: int, store: Path) -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks) if hasattr(os, "sched_getaffinity") else 1
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    return {
        "OMP_NUM_THREADS": str(threads),
        "MASTER_ADDR": "127.0.0.1",
        **os.environ,
        **{name: str(value) for name, value in numbers.items()},
        LAUNCHER_VARIABLE: str(os.getpid()),
        STORE_VARIABLE: str(store),
    }


def _wait(ranks: Sequence[subprocess.Popen[bytes]], came: list[int], grace_s: float) -> int:
    """Pass signals on until every rank has ended; after a failure end the remaining ranks. Return the exit code."""
    running = list(enumerate(ranks))
    failed: int | None = None
    deadline = 0.0
    next_signal = signal.SIGTERM
    while running:
        while came:
            number = came.pop(0)
            for _, process in running:
                process.send_signal(number)
        for rank, process in list(running):
            code = process.poll()
            if code is None:
                continue
            running.remove((rank, process))
            if code < 0:
                print(f"fused-megatron: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
            if code and failed is None:
                failed = code
                deadline = time.monotonic() + grace_s
        if failed is not None and running and time.monotonic() > deadline:
            for _, process in running:
                process.send_signal(next_signal)
            deadline = time.monotonic() + _SIGTERM_S
            next_signal = signal.SIGKILL
        time.sleep(_LOOK_S)
    return 0 if failed is None else failed if failed > 0 else 128 - failed


def store_of_the_launcher() -> str | None:
    """Return the init_method of init_process_group for ranks that launch() started; None under other launchers.

    Raises:
        SharedInputError: the launcher has ended.
    """
    path = os.environ.get(STORE_VARIABLE)
    if path is None:
        return None
    if not Path(path).parent.is_dir():
        raise SharedInputError(f"{STORE_VARIABLE}={path} is of a launcher that has ended (unset {STORE_VARIABLE})")
    return f"file://{path}"
