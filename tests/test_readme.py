"""Start here when an example of README fails or prints something else."""

import contextlib
import os
import re
import runpy
import socket
from pathlib import Path

import torch.distributed as dist
import transformers.modeling_utils  # noqa: F401 - takes seconds: ranks are forked from a process that has it

from fused_megatron.testing import run_on_ranks

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def run_example(code: str, folder: Path) -> list[str]:
    """Return the output of an example on each of two ranks."""
    (folder / "this_file.py").write_text(code)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_on_ranks(run_as_torchrun_does, 2, folder, port)
    return [(folder / f"rank-{rank}").read_text() for rank in range(2)]


def run_as_torchrun_does(rank: int, world_size: int, folder: Path, port: int) -> None:
    """Run the file in torchrun's environment; the file makes its process group itself."""
    dist.destroy_process_group()
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.chdir(folder)
    # A file for each rank: lines that two processes print to one pipe may mix.
    with open(f"rank-{rank}", "w") as output, contextlib.redirect_stdout(output):
        runpy.run_path("this_file.py", run_name="__main__")


def without_last_digit(line: str) -> str:
    """Cut the decimals of the line by one digit: the last one may differ between processors."""
    return re.sub(r"(\.\d*)\d\b", r"\1", line)


def test_examples_print_what_the_page_shows(tmp_path: Path) -> None:
    examples = re.findall(r"```python run\n(.*?)```\n\n((?:    [^\n]*\n)+)", TEXT, re.DOTALL)
    assert len(examples) == 2
    for code, block in examples:
        printed = "".join(run_example(code, tmp_path)).splitlines()
        shown = [line[4:] for line in block.splitlines() if line.strip() != "..."]
        printed = [without_last_digit(line) for line in printed]
        assert [line for line in shown if without_last_digit(line) not in printed] == []


def test_page_is_short() -> None:
    assert len(TEXT.splitlines()) <= 150
