"""Start here when a run that lacks memory ends with a traceback, or another error is taken for a lack of memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_megatron.training.out_of_memory import MemoryShortageError, explain_shortage

CONFIG = """
[model]
num_layers = 1
hidden_size = 256
num_heads = 2
seq_len = 64
[training]
num_steps = 2
global_batch_size = 65536
microbatch_size = 65536
"""
# Address space of the process: more than a start takes, less than a step.
LIMIT_BYTES = 4 << 30


def test_torchs_own_error_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    explained = explain_shortage(caught.value)
    assert isinstance(explained, MemoryShortageError) and "no 3.6e+07 GB for a tensor (a smaller" in str(explained)
    on_gpu = explain_shortage(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"))
    assert str(on_gpu).startswith("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. (a smaller")
    other = RuntimeError("a fault of ours")
    assert explain_shortage(other) is other


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_a_step_without_memory_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "big.toml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("some words of a text that repeat themselves. " * 200)
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({LIMIT_BYTES}, {LIMIT_BYTES}));"
        "from fused_megatron.cli import main; raise SystemExit(main())"
    )
    words = ["train", "big.toml", "--data.path", "text.txt", "--data.cache-folder", "cache"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "fused-megatron: error: out of memory: no " in done.stderr
