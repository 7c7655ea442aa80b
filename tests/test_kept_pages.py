"""Start here when training has page faults, or malloc returns its pages to the system."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fused_megatron import cli, kept_pages

# The module is loaded by its path: neither it nor the measurement needs torch.
MEASURE = """
import importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("kept_pages", sys.argv[1])
kept_pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kept_pages)
said = kept_pages.keep_malloc_pages()
kept_pages.release_free_pages()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"x") * (40 << 20)
    del block
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(said, faults)
"""


def measure(**environment: str) -> tuple[str, int]:
    """Return (result of keep_malloc_pages(), page faults of the fourth block of 40 MB)."""
    clean = {k: v for k, v in os.environ.items() if k not in kept_pages.KEPT_PAGES_ENVIRONMENT}
    command = [sys.executable, "-c", MEASURE, kept_pages.__file__]
    shown = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True).stdout
    said, faults = shown.split()
    return said, int(faults)


@pytest.mark.skipif(not kept_pages.uses_glibc(), reason="another malloc than glibc's")
def test_blocks_come_from_pages_that_are_there():
    pages = (40 << 20) // os.sysconf("SC_PAGE_SIZE")
    said, faults = measure(MALLOC_TOP_PAD_="131072")  # a setting of the user is kept
    assert said == "False" and faults > pages // 2
    said, faults = measure()
    assert said == "True" and faults < pages // 10
    said, faults = measure(**kept_pages.KEPT_PAGES_ENVIRONMENT)  # as the benchmarks start themselves
    assert said == "False" and faults < pages // 10


def test_nothing_happens_with_another_malloc(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))  # musl
    monkeypatch.setattr(kept_pages.ctypes, "CDLL", lambda name: pytest.fail("looked into a libc"))
    assert not kept_pages.keep_malloc_pages()


def test_training_says_it_and_computes_the_same(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(
        "\n\n".join("the quick brown fox jumps over the lazy dog " * 9 for _ in range(40))
    )
    (tmp_path / "tiny.toml").write_text(f"""
        model = {{num_layers = 1, hidden_size = 16, num_heads = 2, seq_len = 16}}
        data = {{path = "{tmp_path / "text.txt"}", cache_folder = "{tmp_path / "cache"}", tokenizer_vocab_size = 270}}
        training = {{num_steps = 2, global_batch_size = 4, microbatch_size = 2, eval_batches = 1}}
    """)
    losses = []
    for name in ("default", "kept"):
        if name == "default":
            monkeypatch.setenv("MALLOC_TOP_PAD_", "131072")
        else:
            monkeypatch.delenv("MALLOC_TOP_PAD_")
        assert cli.main(["train", str(tmp_path / "tiny.toml"), "--training.run-folder", str(tmp_path / name)]) == 0
        said = "malloc keeps" in capsys.readouterr().out
        assert said == (name == "kept" and kept_pages.uses_glibc())
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([record["loss"] for record in records if "loss" in record])
    assert losses[0] == losses[1] and len(losses[0]) == 2
