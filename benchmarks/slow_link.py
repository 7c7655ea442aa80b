"""Two ranks that are joined by a link of a known rate: network namespaces and a veth pair limited by tc tbf."""

import contextlib
import datetime
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from fused_megatron.testing.two_hosts import DEVICE, TwoHosts

RANKS = 2


def join(rank: int, folder: Path, *, real_time: bool) -> None:
    """Make this process, in its namespace, a gloo rank of one thread whose messages cross the link.

    real_time: give gloo's threads a real-time priority: a network card does their work without waiting for a free core.
        Wrong with messages between two ranks: gloo's thread spins while the main thread, which posts them, holds the
        lock of the connection, and would keep it from the core. The threads get a low niceness then.
    """
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    timeout = datetime.timedelta(seconds=30)
    # Both ranks are on one host: with shared memory nothing would cross the link.
    os.environ["FUSED_MEGATRON_SHARED_MEMORY"] = "off"
    dist.init_process_group("gloo", f"file://{folder}/store", timeout, rank=rank, world_size=RANKS)
    dist.barrier()  # gloo's threads exist from here on
    for thread in map(int, os.listdir("/proc/self/task")):
        if thread != os.getpid():
            with contextlib.suppress(PermissionError):
                if real_time:
                    os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(1))
                else:
                    os.setpriority(os.PRIO_PROCESS, thread, -15)


def median_ms(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return medians by name; steps alternate, so that a busy moment of the machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            if i > 0:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def run_on_link(hosts: TwoHosts, name: str, script: str, mbit_per_s: int, limit_s: float) -> None:
    """Make the hosts and their link, run this program on both, and remove them; exit with a line if a rank fails.

    Args:
        hosts: namespaces that do not exist yet.
        name: what the error line begins with.
        script: path of the program. It gets the options of this process, and --rank and --folder.
        mbit_per_s: rate of the link at the start.
        limit_s: time for both ranks.
    """
    # A plain SIGTERM would leave the ranks and the namespaces behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"{name}: ended by SIGTERM"))
    with hosts:
        hosts.limit(mbit_per_s)
        _run_ranks(hosts, name, [sys.executable, script, *sys.argv[1:]], limit_s)


def _run_ranks(hosts: TwoHosts, name: str, command: list[str], limit_s: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        try:
            for rank in range(RANKS):
                # One core for each rank, as on a separate machine.
                pin = ["taskset", "-c", str(rank)] if shutil.which("taskset") else []
                own = [*command, "--rank", str(rank), "--folder", folder]
                ranks.append(subprocess.Popen([*hosts.on(rank), *pin, *own], env=_environment()))
            deadline = time.monotonic() + limit_s
            while any(process.poll() is None for process in ranks):
                if time.monotonic() > deadline:
                    sys.exit(f"{name}: not done after {limit_s:.0f} s (fewer --rates or --rounds, or --limit-s)")
                if any(process.poll() for process in ranks):
                    break
                time.sleep(0.1)
            codes = [process.poll() for process in ranks]
            if any(codes):
                sys.exit(f"{name}: a rank failed: exit codes {codes}")
        finally:
            for process in ranks:
                process.kill()
                process.wait()


def _environment() -> dict[str, str]:
    # Pages that malloc returns and takes again in each step cost a tenth of a product.
    pages = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
    return {**os.environ, **pages, "OMP_NUM_THREADS": "1"}
