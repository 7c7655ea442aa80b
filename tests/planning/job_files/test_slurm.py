"""Start here when a job of Slurm does not save before its time limit, is not requeued, or starts its ranks wrongly."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import InputError
from fused_megatron.cli import main
from fused_megatron.data.indexed_dataset import IndexedDatasetWriter
from fused_megatron.planning.job_files.slurm import SlurmOptions, time_limit_s
from fused_megatron.planning.prediction.cluster import Cluster, cluster_text

ROOT = Path(__file__).parents[3]
NUM_STEPS = 200
CONFIG = f"""
[model]
num_layers = 2
hidden_size = 32
num_heads = 2
seq_len = 16
vocab_size = 300
[training]
num_steps = {NUM_STEPS}
global_batch_size = 4
microbatch_size = 2
eval_interval = {NUM_STEPS}
eval_batches = 1
log_interval = 1
checkpoint_interval = 1000
"""
CPUS = Cluster("cores", "cpu", 1, 8.0, 0.1, 0.5, 1.0, 0.5, 10.0, 1.0, 5.0, 10.0, 1.0, 30.0)
# What a test needs of srun: a process for each task, the variables of Slurm, signals passed on, the highest exit code.
SRUN = """#!{python}
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
ranks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
folder = os.environ["STUB_FOLDER"]
step = len(open(folder + "/steps").readlines())
open(folder + "/steps", "a").write(" ".join(sys.argv[1:]) + "\\n")
tasks, came = [], []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: [task.send_signal(number) for task in tasks])
per_node = ranks // nodes
for task in range(ranks):
    own = dict(SLURM_PROCID=task, SLURM_LOCALID=task % per_node, SLURM_STEP_NUM_TASKS=ranks, SLURM_STEP_ID=step,
               SLURM_STEP_TASKS_PER_NODE=f"{{per_node}}(x{{nodes}})")
    prefix = os.environ.get(f"STUB_ON_NODE_{{task // per_node}}", "").split()
    environment = os.environ | {{name: str(value) for name, value in own.items()}}
    tasks.append(subprocess.Popen([*prefix, *words], env=environment))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/bash
case "$1" in
show) echo "$STUB_ADDRESS" ;;
requeue) echo "$2" >> "$STUB_FOLDER/requeued" ;;
esac
"""


class Slurm:
    """A folder with the programs of Slurm that a batch file calls, and an sbatch that runs a file at once.

    Args:
        folder: for the programs and their records.
        python: text of a program `python`; None: this Python.
    """

    def __init__(self, folder: Path, python: str | None = None) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        real = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
        programs = {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL, "python": python or real}
        for name, text in programs.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "steps").touch()
        self.environment: dict[str, str] = {}

    def sbatch(self, file: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Run a batch file as its first node would."""
        options = dict(
            line.removeprefix("#SBATCH --").partition("=")[::2]
            for line in file.read_text().splitlines()
            if line.startswith("#SBATCH")
        )
        nodes, per_node = int(options["nodes"]), int(options["ntasks-per-node"])
        slurm = {
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_NNODES": str(nodes),
            "SLURM_NTASKS": str(nodes * per_node),
            "STUB_FOLDER": str(self.folder),
            "STUB_ADDRESS": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
        }
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(
                ["bash", str(file)],
                env={**os.environ, **slurm, **self.environment, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def steps(self) -> list[str]:
        """Words of each srun so far."""
        return (self.folder / "steps").read_text().splitlines()

    @property
    def requeued(self) -> int:
        path = self.folder / "requeued"
        return len(path.read_text().splitlines()) if path.exists() else 0

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool], job: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline and job.poll() is None, self.log
            time.sleep(0.02)


def printed(words: Sequence[str], capsys: pytest.CaptureFixture[str], file: Path) -> Path:
    """Write what `fused-megatron launch slurm` prints."""
    assert main(["launch", "slurm", *words]) == 0
    file.write_text(capsys.readouterr().out)
    return file


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "my run.toml"
    path.write_text(CONFIG)
    (tmp_path / "cores.toml").write_text(cluster_text(CPUS))
    return path


def words_of(config: Path) -> list[str]:
    return [str(config), "--nodes", "2", "--cluster", str(config.parent / "cores.toml")]


def test_the_file(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [str(config), "--nodes", "2", "--time", "1-12", "--stop-before", "600", "--setup", "source 'a b/activate'"]
    text = printed([*words, "--data.path", "it's"], capsys, tmp_path / "file").read_text()
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    for setting in ("job-name=my-run", "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "exclusive", "time=1-12"):
        assert f"#SBATCH --{setting}" in lines
    assert {"#SBATCH --signal=B:USR1@600", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= {*lines}
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])  # sbatch stops reading there
    assert "source 'a b/activate'" in lines
    assert "--gpu-bind=none" in text and "--distribution=block:block" in text
    assert f"python -m fused_megatron train '{config}' --data.path 'it'\"'\"'s' --parallel." in text
    assert subprocess.run(["bash", "-n", str(tmp_path / "file")]).returncode == 0
    part = printed([str(config), "--nodes", "1", "--gpus-per-node", "2"], capsys, tmp_path / "part").read_text()
    assert "--exclusive" not in part and "#SBATCH --gpus-per-node=2" in part
    cpu = printed(words_of(config), capsys, tmp_path / "cpu").read_text()
    assert "gpu" not in cpu.split("#SBATCH", 1)[1]


def test_time_limits() -> None:
    limits = {"90": 5400, "1:30": 90, "24:00:00": 86400, "2-12": 216000, "2-12:30": 217800, "1-0:0:1": 86401}
    assert {text: time_limit_s(text) for text in limits} == limits
    for text in ("", "0", "1:2:3:4", "-1", "1h", "1-"):
        with pytest.raises(InputError, match="time="):
            time_limit_s(text)
    with pytest.raises(InputError, match="one line"):
        SlurmOptions(setup="a\nb")


# Ends with the next number of the file `codes`; with "wait", when a signal comes: with 75, as our ranks do.
PYTHON = """#!/bin/bash
code=$(head -n 1 "$STUB_FOLDER/codes")
[ "$SLURM_PROCID" != 1 ] || sed -i 1d "$STUB_FOLDER/codes"
[ "$SLURM_PROCID" = 1 ] || exit 0
[ "$code" = wait ] || exit "$code"
trap 'echo "$FUSED_MEGATRON_STOPPED_CODE" > "$STUB_FOLDER/came"; exit "$FUSED_MEGATRON_STOPPED_CODE"' USR1 TERM
touch "$STUB_FOLDER/ready"
while :; do sleep 0.01; done
"""


@pytest.mark.parametrize(
    ("codes", "number", "exit_code", "starts", "requeued"),
    [
        (["0"], None, 0, 1, 0),
        (["1", "137", "0"], None, 0, 3, 0),  # a rank fails twice: started again in the same job
        (["1"] * 9, None, 1, 4, 0),
        (["2"], None, 2, 1, 0),  # bad input
        (["75"], None, 75, 1, 0),  # ended by their user, not by the time limit
        (["wait"], signal.SIGUSR1, 75, 1, 1),
        (["1", "wait"], signal.SIGUSR1, 75, 2, 1),
        (["wait"], signal.SIGTERM, 75, 1, 0),
    ],
)
def test_starts_signals_and_requeues(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    codes: list[str],
    number: signal.Signals | None,
    exit_code: int,
    starts: int,
    requeued: int,
) -> None:
    slurm = Slurm(tmp_path, PYTHON)
    (tmp_path / "codes").write_text("\n".join(codes) + "\n")
    job = slurm.sbatch(printed(words_of(config), capsys, tmp_path / "file"))
    if number is not None:
        slurm.wait_until((tmp_path / "ready").exists, job)
        job.send_signal(number)
    assert job.wait(60) == exit_code, slurm.log
    assert (len(slurm.steps), slurm.requeued) == (starts, requeued), slurm.log
    assert all("-m fused_megatron train" in step for step in slurm.steps)


def losses(run: RunFolder) -> dict[int, float]:
    records = [record for record in run.read_metrics() if "loss" in record]
    found = {record["step"]: record["loss"] for record in records}
    assert len(found) == len(records)  # no step twice
    return found


def check_resumes(slurm: Slurm, config: Path, capsys: pytest.CaptureFixture[str], file: Path, num_ranks: int) -> None:
    """Run the printed file on real ranks, signal it, run it again, and compare with a run that nothing interrupts."""
    folder = config.parent
    with IndexedDatasetWriter(folder / "set", np.dtype(np.int32), vocab_size=300) as writer:
        rng = np.random.default_rng(0)
        for length in rng.integers(5, 80, size=200):
            writer.add_document(rng.integers(0, 300, size=length))
    run, one = RunFolder(folder / "run"), RunFolder(folder / "one")
    own = ["--data.path", str(folder / "set")]
    words = [*words_of(config), *own, "--training.run_folder", str(run.path)]
    printed(words, capsys, file)
    job = slurm.sbatch(file)
    slurm.wait_until(lambda: len(losses(run)) > 10 if run.metrics.exists() else False, job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(300) == 75, slurm.log
    reached = max(losses(run))
    assert reached < NUM_STEPS and slurm.requeued == 1, slurm.log
    assert f"stopped by SIGUSR1 after step {reached}" in slurm.log
    assert slurm.sbatch(file).wait(300) == 0, slurm.log
    assert slurm.requeued == 1 and f"(step {reached})" in slurm.log
    command = [sys.executable, "-m", "fused_megatron", "launch", "--nproc-per-node", str(num_ranks), "train"]
    layout = file.read_text().split(str(run.path))[-1].split("&")[0].split()
    command += [str(config), *own, "--training.run_folder", str(one.path), *layout]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert losses(run) == losses(one) and len(losses(one)) == NUM_STEPS


@pytest.mark.slow
def test_a_signal_saves_requeues_and_the_same_file_resumes(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    check_resumes(Slurm(tmp_path), config, capsys, tmp_path / "file", 2)


@pytest.mark.slow
def test_two_nodes(two_hosts: Any, config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    slurm = Slurm(tmp_path)
    # The namespaces share the memory of this machine, as two machines do not.
    slurm.environment = {
        "STUB_ADDRESS": two_hosts.addresses[0],
        "GLOO_SOCKET_IFNAME": "veth0",
        "FUSED_MEGATRON_SHARED_MEMORY": "off",
        **{f"STUB_ON_NODE_{node}": " ".join(two_hosts.on(node)) for node in (0, 1)},
    }
    check_resumes(slurm, config, capsys, tmp_path / "file", 2)
