"""Start here when a run of torchrun on several machines does not start, or does not go on after a machine was lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.data.indexed_dataset import IndexedDatasetWriter

ROOT = Path(__file__).parents[2]
NUM_STEPS = 250
CONFIG = f"""
[model]
num_layers = 2
hidden_size = 32
num_heads = 2
seq_len = 16
[parallel]
timeout_s = 120
[training]
num_steps = {NUM_STEPS}
global_batch_size = 4
microbatch_size = 2
eval_interval = {NUM_STEPS}
eval_batches = 1
log_interval = 1
checkpoint_interval = 20
"""


class Machines:
    """Two machines, on each of which the command of docs/several_machines.md is started: a rank on each.

    Args:
        hosts: the namespaces.
        folder: the shared folder, with the config, the data and the run.
    """

    def __init__(self, hosts: Any, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        with IndexedDatasetWriter(folder / "set", np.dtype(np.int32), vocab_size=300) as writer:
            rng = np.random.default_rng(0)
            for length in rng.integers(5, 80, size=200):
                writer.add_document(rng.integers(0, 300, size=length))
        (folder / "run.toml").write_text(CONFIG)
        self.run = RunFolder(folder / "run")
        self.started: list[subprocess.Popen[bytes]] = []

    def train(self, run: Path) -> list[str]:
        """Return the command without its launcher."""
        config = str(self.folder / "run.toml")
        return ["train", config, "--data.path", str(self.folder / "set"), "--training.run_folder", str(run)]

    def start(self, host: int) -> subprocess.Popen[bytes]:
        """Start the command on a machine."""
        addresses = self.hosts.addresses
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{addresses[0]}:29400", "--rdzv-id", "1"),
            *("--rdzv-conf", f"is_host={int(host == 0)}", "--local-addr", addresses[host], "--max-restarts", "3"),
            *("-m", "fused_megatron", *self.train(self.run.path)),
        ]
        # The namespaces share the memory of this machine, as two machines do not.
        # A new agent finds the others only where they do not share their store (torch 2.13 and 2.14).
        own = {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "GLOO_SOCKET_IFNAME": "veth0",
            "FUSED_MEGATRON_SHARED_MEMORY": "off",
            "OMP_NUM_THREADS": "1",
        }
        with open(self.folder / f"said-{host}", "ab") as said:
            process = subprocess.Popen(
                [*self.hosts.on(host), *command],
                env={**os.environ, "PYTHONPATH": str(ROOT), **own},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def said(self) -> str:
        return "\n".join((self.folder / f"said-{host}").read_text(errors="replace") for host in (0, 1))

    def losses(self) -> dict[int, float]:
        """Return the loss of each step so far; a step that is written twice is an error."""
        records = [record for record in self.run.read_metrics() if "loss" in record]
        losses = {record["step"]: record["loss"] for record in records}
        assert len(losses) == len(records)
        return losses

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, self.said()
            assert all(process.poll() in (None, 0, -signal.SIGKILL) for process in self.started[-2:]), self.said()
            time.sleep(0.02)

    def wait_for_more_steps(self) -> None:
        reached = max(self.losses())
        self.wait_until(lambda: max(self.losses()) > reached + 10)

    def end(self) -> None:
        for process in self.started:
            for pid in (*ranks_of(process), process.pid):
                if process.poll() is None:
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def ranks_of(agent: subprocess.Popen[bytes]) -> list[int]:
    """Return the processes of the ranks that an agent of torchrun has started."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


@pytest.mark.slow
def test_a_run_survives_the_loss_of_a_rank_and_of_a_machine_and_a_stop(two_hosts: Any, tmp_path: Path) -> None:
    machines = Machines(two_hosts, tmp_path)
    try:
        agents = [machines.start(host) for host in (0, 1)]
        machines.wait_until(lambda: len(machines.losses()) > 25)
        # A rank dies: both agents start their rank again, and the run resumes from a checkpoint.
        (rank,) = ranks_of(agents[1])
        os.kill(rank, signal.SIGKILL)
        machines.wait_until(lambda: rank not in ranks_of(agents[1]) and machines.said().count("resum") >= 1)
        machines.wait_for_more_steps()
        # A machine dies, agent and all, and gets the same command.
        (rank,) = ranks_of(agents[1])
        os.kill(agents[1].pid, signal.SIGKILL)
        os.kill(rank, signal.SIGKILL)
        agents[1].wait()
        agents[1] = machines.start(1)
        machines.wait_for_more_steps()
        # One machine is asked to end: the run is saved and ends on both, and the same commands resume it.
        agents[0].send_signal(signal.SIGTERM)
        assert [agent.wait(300) for agent in agents] == [1, 0], machines.said()  # torchrun's own code after a signal
        assert max(machines.losses()) < NUM_STEPS
        agents = [machines.start(host) for host in (0, 1)]
        machines.wait_until(lambda: all(agent.poll() == 0 for agent in agents))
    finally:
        machines.end()
    # The losses of a run on one machine that nothing interrupts.
    command = [
        sys.executable,
        "-m",
        "fused_megatron",
        "launch",
        "--nproc-per-node",
        "2",
        *machines.train(tmp_path / "one"),
    ]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    records = RunFolder(tmp_path / "one").read_metrics()
    expected = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert machines.losses() == expected and len(expected) == NUM_STEPS
