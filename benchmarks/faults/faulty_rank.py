"""One rank of a training run in which something goes wrong, on some ranks, at a step.

    python benchmarks/faults/faulty_rank.py KIND RANKS STEP train CONFIG.toml ...     a rank; RANKS as in 1,2

It is started as the ranks of a run are (benchmarks/faults/rank_faults.py; torchrun), and changes nothing of the
program: a hook that torch calls before the forward of the rank's stage does what KIND says.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook

SLOW_FSYNC_S = 8.0
LATE_S = 12.0
LAG_S = 2.0


def spin() -> None:
    """An endless loop of Python."""
    while True:
        pass


def sleep_for_ever() -> None:
    """A thread that never comes back, and needs no processor."""
    time.sleep(1e6)


def lag() -> None:
    """Work that is right, and slow."""
    time.sleep(LAG_S)


# What happens at the step, or at every step from it on.
KINDS: dict[str, tuple[Callable[[], None], bool]] = {
    "stop": (lambda: os.kill(os.getpid(), signal.SIGSTOP), False),
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), False),
    "spin": (spin, False),
    "sleep": (sleep_for_ever, False),
    "lag": (lag, True),
    "late": (lambda: time.sleep(LATE_S), False),
    "none": (lambda: None, False),
}


def plant(kind: str, step: int) -> None:
    """Let it happen in the forward of that step (from 1 on), which has one microbatch."""
    happen, every_step = KINDS[kind]
    first: list[Any] = []
    seen = 0

    def hook(module: Any, _: Any) -> None:
        nonlocal seen
        if not module.training:
            return
        first[:] = first or [module]
        seen += module is first[0]
        if module is first[0] and (seen == step or (every_step and seen > step)):
            print(f"fault: {kind} at step {seen} on rank {os.environ['RANK']}", flush=True)
            happen()

    register_module_forward_pre_hook(hook)


def slow_fsync() -> None:
    """A disk that takes seconds to sync each file."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(SLOW_FSYNC_S)
        fsync(descriptor)

    os.fsync = slow


def main(words: list[str]) -> int:
    kind, ranks, step, *command = words
    if os.environ["RANK"] in ranks.split(","):
        if kind == "slow-fsync":
            slow_fsync()
        else:
            plant(kind, int(step))
    from fused_megatron.cli import main as run  # noqa: PLC0415 - as the command starts

    return run(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
