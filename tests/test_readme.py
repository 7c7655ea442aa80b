"""Start here when an example of README fails, or a target of make that it names is gone."""

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


def run_example(code: str, note: str, folder: Path) -> list[str]:
    """What an example says on each rank, by a note put before its last line."""
    # A file of each rank's own: what two processes print to one pipe can be torn.
    note = f"import pathlib; pathlib.Path(f'rank-{{dist.get_rank()}}').write_text({note})"
    (folder / "this_file.py").write_text(code.replace("dist.destroy", f"{note}\ndist.destroy"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_on_ranks(run_as_torchrun_does, 2, folder, port)
    return [(folder / f"rank-{rank}").read_text() for rank in range(2)]


def run_as_torchrun_does(rank: int, world_size: int, folder: Path, port: int) -> None:
    """The file makes its process group itself."""
    dist.destroy_process_group()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.chdir(folder)
    runpy.run_path("this_file.py", run_name="__main__")


def test_examples_run_on_two_ranks(tmp_path: Path) -> None:
    layers, model = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    for said in run_example(layers, "f'{up.weight.grad.norm()} {y.shape}'", tmp_path):
        norm, shape = said.split(maxsplit=1)
        assert float(norm) > 0 and shape == "torch.Size([32, 4, 256])"
    note = "f'{model.lm_head.weight.grad.norm()} {model.lm_head.weight.shape} {state[\"lm_head.weight\"].shape}'"
    for said in run_example(model, note, tmp_path):
        norm, shapes = said.split(maxsplit=1)
        assert float(norm) > 0 and shapes == "torch.Size([500, 64]) torch.Size([1000, 64])"


def test_commands_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^ +make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
