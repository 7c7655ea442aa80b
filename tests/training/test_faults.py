"""Start here when a killed rank leaves the others waiting, or costs more than the steps since the last checkpoint."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fused_megatron.checkpoint import checkpoint_step, newest_checkpoint, verify_checkpoint
from fused_megatron.checkpoint.run_folder import CLOCK_FIELDS, RunFolder

TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2",
]  # fmt: skip
CONFIG = """
[model]
num_layers = 2
hidden_size = 32
num_heads = 2
seq_len = 16
[parallel]
tensor_parallel_size = 2
[data]
path = "{text}"
cache_folder = "{cache}"
tokenizer_vocab_size = 280
[training]
num_steps = 40
global_batch_size = 4
microbatch_size = 4
eval_interval = 20
eval_batches = 1
checkpoint_interval = 10
keep_checkpoints = 5
log_interval = 1
run_folder = "{run}"
"""
# Kills the process that imports it, as `kill -9` would: when rank 1 begins step 25, or when it writes the named file.
# The environment chooses which.
SABOTAGE = """
import os, signal
if os.environ.get("RANK") == "1":
    import fused_megatron.training.trainer as trainer
    import fused_megatron.checkpoint.save as save
    if "KILL_AT_STEP" in os.environ:
        original = trainer.Trainer.train_step
        def train_step(self):
            if self.progress.step + 1 == int(os.environ["KILL_AT_STEP"]):
                os.kill(os.getpid(), getattr(signal, os.environ.get("KILL_WITH", "SIGKILL")))
            return original(self)
        trainer.Trainer.train_step = train_step
    if "KILL_AT_SAVE" in os.environ:
        write = save._write_file
        def write_file(path, tensors, step):
            if step == int(os.environ["KILL_AT_SAVE"]):
                path.write_bytes(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)
            return write(path, tensors, step)
        save._write_file = write_file
import sys
from fused_megatron.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i}: " + "one two three four five " * 12 for i in range(80)))
    (folder / "sabotaged.py").write_text(SABOTAGE)
    path = folder / "config.toml"
    path.write_text(CONFIG.format(text=text, cache=folder / "cache", run=folder / "whole"))
    return path


@pytest.fixture(scope="module")
def whole(config: Path) -> list[dict[str, Any]]:
    """Return the loss curve of an undisturbed run."""
    result = launch(config)
    assert result.returncode == 0, result.stderr
    return curve(config.parent / "whole")


def launch(config: Path, *words: str, **environment: str) -> Any:
    command = [*TORCHRUN, str(config.parent / "sabotaged.py"), "train", str(config), *words]
    return subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=600
    )


def curve(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in CLOCK_FIELDS} for r in RunFolder(run).read_metrics()]


@pytest.mark.slow  # test_layouts.py kills a rank in the fast part, test_save.py one that saves
@pytest.mark.parametrize(("fault", "newest"), [
    ({"KILL_AT_STEP": "25"}, 20), ({"KILL_AT_SAVE": "30"}, 20),
], ids=["step", "save"])  # fmt: skip
def test_kill_9_of_one_rank(config: Path, whole: Any, tmp_path: Path, fault: dict[str, str], newest: int) -> None:
    run = tmp_path / "run"
    words = ("--training.run_folder", str(run))
    started = time.monotonic()
    killed = launch(config, *words, **fault)
    assert time.monotonic() - started < 300
    assert killed.returncode != 0
    ours = [line for line in killed.stderr.splitlines() if line.startswith("fused-megatron: error: ")]
    assert len(ours) == 1, killed.stderr
    assert "lost contact with rank 1 (" in ours[0]
    found = newest_checkpoint(run / "checkpoints")
    # The checkpoint before `newest` if the kill came while a thread wrote `newest`.
    resumable = [newest - 10, newest] if "KILL_AT_STEP" in fault else [newest]
    assert found is not None and checkpoint_step(found) in resumable
    newest = checkpoint_step(found)
    assert all(verify_checkpoint(p) == [] for p in (run / "checkpoints").glob("step-??????"))
    resumed = launch(config, *words)
    assert resumed.returncode == 0, resumed.stderr
    assert f"(step {newest})" in resumed.stdout
    assert curve(run) == whole


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(config: Path, whole: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--training.run_folder", str(run))
    stopped = launch(config, *words, KILL_AT_STEP="13", KILL_WITH="SIGTERM")
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped by SIGTERM after step 13; the checkpoint is written" in stopped.stdout
    assert launch(config, *words).returncode == 0
    assert curve(run) == whole


@contextlib.contextmanager
def started(config: Path, run: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start our own launcher; return it and the ids of its two ranks, after some steps of a long run."""
    command = [
        *[sys.executable, "-m", "fused_megatron", "launch", "--nproc-per-node", "2", "train", str(config)],
        *["--training.num_steps", "100000", "--training.run_folder", str(run), *words],
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while "step 2/" not in process.stdout.readline():
            assert process.poll() is None
        status = [(int(path.name), (path / "stat").read_text()) for path in Path("/proc").glob("[0-9]*")]
        ranks = [pid for pid, text in status if text.rpartition(")")[2].split()[1] == str(process.pid)]
        assert len(ranks) == 2
        yield process, ranks


def stopped_after(shown: str, reason: str, run: Path) -> int:
    """Return the step that a stopped run says it saved, which must be the newest checkpoint."""
    (step,) = re.findall(rf"stopped by {reason} after step (\d+); the checkpoint is written", shown)
    found = newest_checkpoint(run / "checkpoints")
    assert found is not None and checkpoint_step(found) == int(step) >= 2
    return int(step)


@pytest.mark.parametrize(
    ("number", "to_ranks"),
    [
        ("SIGTERM", True),  # as a scheduler does
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("SIGINT", "SIGHUP", "SIGUSR1")),
    ],
)
def test_a_signal_saves_and_the_launcher_ends_well(config: Path, tmp_path: Path, number: str, to_ranks: bool) -> None:
    with started(config, tmp_path) as (process, ranks):
        for pid in (process.pid, *(ranks if to_ranks else ())):
            os.kill(pid, signal.Signals[number])
        shown, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (0, "")
    stopped_after(shown, number, tmp_path)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


@pytest.mark.slow  # test_run_folder_lease.py and test_stop_request.py have the parts
def test_two_runs_in_one_folder_and_a_killed_launcher(config: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "fused_megatron",
        "launch",
        "--nproc-per-node=2",
        "train",
        str(config),
        "--training.run_folder",
        str(tmp_path),
        "--training.num_steps",
    ]
    with started(config, tmp_path) as (process, ranks):
        second = subprocess.run([*words, "100000"], capture_output=True, text=True, timeout=600)
        assert second.returncode == 2
        (line,) = second.stderr.splitlines()
        assert f"run_folder={tmp_path} is in use by run " in line and f"(process {ranks[0]} on " in line
        process.kill()
        third = subprocess.Popen([*words, "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        step = stopped_after(process.communicate(timeout=600)[0], "the end of its launcher", tmp_path)
    assert third.stdout is not None
    shown = [third.stdout.readline()]
    while not shown[-1].startswith("step "):  # the training loop has begun
        assert shown[-1]
        shown.append(third.stdout.readline())
    assert any(line.endswith(f"(step {step})\n") for line in shown)
    third.send_signal(signal.SIGINT)
    assert (third.communicate(timeout=600)[1], third.returncode) == ("", 0)
