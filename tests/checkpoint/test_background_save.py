"""Start here when a checkpoint holds values of a later step, or a save in the background fails unnoticed or hangs."""

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fused_megatron.checkpoint import (
    BackgroundSave,
    CheckpointError,
    TensorBox,
    list_checkpoints,
    load_checkpoint,
    verify_checkpoint,
)
from fused_megatron.checkpoint import save as save_module
from fused_megatron.checks import InputError
from fused_megatron.testing import RankError, run_on_ranks


def loaded(path: Path, names: list[str]) -> dict[str, list[float]]:
    tensors = {name: TensorBox.whole(torch.zeros(3, 2)) for name in names}
    load_checkpoint(path, tensors, allow_extra=["*"])
    return {name: box.tensor.flatten().tolist() for name, box in tensors.items()}


def test_a_checkpoint_has_the_values_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights change while the file waits to be written; the next save takes new values and other tensors."""
    changed, write = threading.Event(), save_module._write_file

    def write_file(*arguments: object) -> dict[str, int]:
        assert changed.wait(60)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(save_module, "_write_file", write_file)
    weight, state = torch.ones(2, 3).t(), {"seen": [1]}  # not contiguous
    saver = BackgroundSave(None)
    saver.start(tmp_path, 1, {"weight": TensorBox.whole(weight)}, state=state)
    weight.fill_(2.0)
    state["seen"].append(2)
    assert list_checkpoints(tmp_path) == []
    changed.set()
    for step in (2, 3):  # the second time with one more tensor
        more = {"more": TensorBox.whole(torch.full((3, 2), 5.0))} if step == 3 else {}
        saver.start(tmp_path, step, {"weight": TensorBox.whole(weight), **more}, state={}, keep=9)
        weight.add_(1.0)
    saver.finish()
    saver.finish()
    third, second, first = list_checkpoints(tmp_path)
    assert loaded(first, ["weight"]) == {"weight": [1.0] * 6}
    assert load_checkpoint(first, {}, allow_extra=["*"]) == {"seen": [1]}
    assert loaded(second, ["weight"]) == {"weight": [2.0] * 6}
    assert loaded(third, ["weight", "more"]) == {"weight": [3.0] * 6, "more": [5.0] * 6}


def save_twice(rank: int, world_size: int, folder: Path) -> list[tuple[str, int]]:
    """Save replicated tensors; return the number of bytes that this rank copied, and the error of the second save."""
    saver = BackgroundSave(dist.group.WORLD)
    tensors = {f"w{i}": TensorBox.whole(torch.full((250,), float(i))) for i in range(4)}
    saver.start(folder, 1, tensors, state={})
    saver.finish()
    num_bytes = sum(tensor.nbytes for tensor in saver._snapshot.values())
    if rank == 1:
        original = save_module.write_shard_file

        def fail(*_: object) -> dict[str, int]:
            save_module.write_shard_file = original
            raise OSError(28, "No space left on device")

        save_module.write_shard_file = fail
    saver.start(folder, 2, tensors, state={})
    with pytest.raises(CheckpointError) as caught:
        saver.finish()
    assert not saver.failed
    assert [path.name for path in list_checkpoints(folder)] == ["step-000001"]
    saver.start(folder, 3, tensors, state={})
    saver.finish()
    return [(str(caught.value), num_bytes)]


def test_a_failed_write_is_one_error_on_every_rank_and_each_box_is_copied_once(tmp_path: Path) -> None:
    (first,), (second,) = run_on_ranks(save_twice, 2, tmp_path, timeout_s=100)
    assert first[0] == second[0]
    assert first[0].startswith("rank 1: rank-00001-of-00002.safetensors of ") and "disk full" in first[0]
    assert first[1] + second[1] == 4 * 250 * 4
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003", "step-000001"]
    assert all(verify_checkpoint(path) == [] for path in list_checkpoints(tmp_path))


def start_with_a_fault(rank: int, world_size: int, folder: Path) -> None:
    saver = BackgroundSave(dist.group.WORLD)
    saver.start(folder, 4 + rank, {}, state={})


def test_arguments_that_do_not_fit_are_refused_by_start(tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(start_with_a_fault, 2, tmp_path, timeout_s=100)
    assert {str(error) for error in caught.value.errors.values()} == {
        "step=[4, 5] by rank: all ranks must save the same step"
    }
    assert all(isinstance(error, InputError) for error in caught.value.errors.values())
