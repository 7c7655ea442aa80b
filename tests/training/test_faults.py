"""Start here when a killed rank leaves the others waiting, or costs more than the steps since the last checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fused_megatron.checkpoint import newest_checkpoint, verify_checkpoint
from fused_megatron.checkpoint.run_folder import RunFolder

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
# Kills the process it is imported into, as `kill -9` would: when rank 1 begins step 25, or writes the file that is
# named, whichever the environment asks for.
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
    """The curve of a run that nothing disturbs."""
    result = launch(config)
    assert result.returncode == 0, result.stderr
    return curve(config.parent / "whole")


def launch(config: Path, *words: str, **environment: str) -> Any:
    command = [*TORCHRUN, str(config.parent / "sabotaged.py"), "train", str(config), *words]
    return subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=600
    )


def curve(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in RunFolder(run).read_metrics()]


@pytest.mark.slow  # test_layouts.py kills a rank in the fast part, test_save.py one that saves
@pytest.mark.parametrize(("fault", "newest"), [
    ({"KILL_AT_STEP": "25"}, 20), ({"KILL_AT_SAVE": "30"}, 20),
], ids=["step", "save"])  # fmt: skip
def test_kill_9_of_one_rank(
    config: Path, whole: list[dict[str, Any]], tmp_path: Path, fault: dict[str, str], newest: int
) -> None:
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
    assert found is not None and found.name == f"step-{newest:06d}"
    assert all(verify_checkpoint(p) == [] for p in (run / "checkpoints").glob("step-??????"))
    resumed = launch(config, *words)
    assert resumed.returncode == 0, resumed.stderr
    assert f"(step {newest})" in resumed.stdout
    assert curve(run) == whole


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(config: Path, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--training.run_folder", str(run))
    stopped = launch(config, *words, KILL_AT_STEP="13", KILL_WITH="SIGTERM")
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped by SIGTERM after step 13; the checkpoint is written" in stopped.stdout
    assert launch(config, *words).returncode == 0
    assert curve(run) == whole


def test_interrupted_from_the_keyboard(config: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "fused_megatron", "train", str(config), "--parallel.tensor_parallel_size", "1",
             "--training.num_steps", "100000", "--training.run_folder", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "step 2/" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1].startswith("fused-megatron: error: interrupted")
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
