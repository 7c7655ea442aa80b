"""Start here when a file in examples/ does not run, or computes something else than it states."""

import contextlib
import difflib
import io
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import functorch.compile  # noqa: F401 - as below, for the example that is compiled
import pytest
import torch
import torch.distributed as dist
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it
import transformers.trainer  # as above

from fused_megatron.testing import run_on_ranks

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_alone(path: Path, *arguments: str) -> str:
    """Run a file by itself, as a user would; return what it prints."""
    command = [sys.executable, str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_as_torchrun_does(rank: int, world_size: int, path: str, arguments: tuple[str, ...], port: int) -> str:
    """Run a file as torchrun does: it makes its process group itself. Return what it prints on this rank."""
    dist.destroy_process_group()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    sys.argv = [path, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue()


def run_on(world_size: int, path: Path, *arguments: str) -> list[str]:
    """Run a file on several ranks; return what each rank prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return run_on_ranks(run_as_torchrun_does, world_size, str(path), arguments, port, timeout_s=300)


def losses(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss ([\d.]+)", printed)]


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of the plain loop, from which every trace of this package is removed."""
    source = (EXAMPLES / "plain_loop.py").read_text()
    source = re.sub(r"^fm\.parallelize.*\n", "", source, flags=re.MULTILINE)
    source = source.replace("fm.ops.cross_entropy", "torch.nn.functional.cross_entropy")
    source = source.replace("import fused_megatron as fm\n", "")
    assert "fm." not in source
    path = tmp_path_factory.mktemp("examples") / "without.py"
    path.write_text(source)
    found = losses(run_on(1, path)[0])
    assert len(found) == 4 and found[-1] < 0.1 * found[0]
    return found


@pytest.mark.parametrize(("name", "world_size"), [
    ("plain_loop.py", 2), ("accelerate_loop.py", 2),
    *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("plain_loop.py", "accelerate_loop.py")),
])  # fmt: skip
def test_loops_keep_the_weights_and_the_losses(name: str, world_size: int, plain_losses: list[float]) -> None:
    if name == "accelerate_loop.py":
        pytest.importorskip("accelerate")
    by_itself = name == "plain_loop.py" and world_size == 1  # as a reader would start it
    printed = [run_alone(EXAMPLES / name)] if by_itself else run_on(world_size, EXAMPLES / name)
    torch.testing.assert_close(losses(printed[0]), plain_losses, rtol=1e-4, atol=1e-5)
    assert not any(losses(other) for other in printed[1:])


def test_accelerate_is_four_lines_away_from_the_plain_loop() -> None:
    plain, accelerate = (
        (EXAMPLES / name).read_text().rpartition('"""\n')[2].splitlines()
        for name in ("plain_loop.py", "accelerate_loop.py")
    )
    new = [line for line in difflib.ndiff(plain, accelerate) if line.startswith("+ ")]
    assert len(new) == 4 and [f"# {i}" in line for i, line in enumerate(new, 1)] == [True] * 4


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_loop_keeps_the_losses(world_size: int, plain_losses: list[float]) -> None:
    printed = run_on(world_size, EXAMPLES / "sharded_loop.py")
    torch.testing.assert_close(losses(printed[0]), plain_losses, rtol=1e-4, atol=1e-5)
    assert printed[1:] == [""] * (world_size - 1)


def test_accelerate_sharded_loop() -> None:
    pytest.importorskip("accelerate")
    alone, printed = (run_on(ranks, EXAMPLES / "accelerate_sharded_loop.py")[0] for ranks in (1, 2))
    assert len(losses(printed)) == 10 and losses(printed)[-1] < 0.9 * losses(printed)[0]
    assert len(losses(alone)) == 10


def test_hugging_face_trainer(tmp_path: Path) -> None:
    """tests/interop/test_trainer_callback.py compares with one process without this package."""
    held_out = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        held_out.append(losses(run_on(ranks, EXAMPLES / "hugging_face_trainer.py", str(folder))[0])[-1])
        saved = transformers.AutoModelForCausalLM.from_pretrained(folder / "final")
        assert saved.lm_head.weight.shape == (64, 32)
    assert held_out[0] < 3 and held_out[0] == pytest.approx(held_out[1], rel=1e-3)


def test_fsdp2_and_tensor_parallel() -> None:
    """tests/tensor_parallel/test_fsdp2.py checks its numbers."""
    printed = run_on(4, EXAMPLES / "fsdp2_and_tensor_parallel.py")
    assert len(losses(printed[0])) == 5 and printed[1:] == [""] * 3


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_compile_model(world_size: int) -> None:
    """With the backend that generates no code; tests/ops compiles every op with inductor."""
    path = EXAMPLES / "compile_model.py"
    printed = run_on(world_size, path, "eager")
    for rank, line in enumerate(printed):
        assert line == f"rank {rank}: compiled and eager agree, values and 12 gradients\n"


def test_every_example_has_its_test_and_its_place_in_the_documents() -> None:
    mine, page = Path(__file__).read_text(), (EXAMPLES.parent / "docs" / "interop.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.name in mine and f"examples/{path.name}" in page, path.name
