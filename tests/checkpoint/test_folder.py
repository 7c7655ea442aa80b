"""Start here when a checkpoint is not found, or the wrong one is taken as the newest."""

import pytest
import torch

from fused_megatron.checkpoint import (
    CheckpointError,
    TensorBox,
    checkpoint_step,
    list_checkpoints,
    newest_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)


def save(folder, step, keep=2):
    return save_checkpoint(folder, step, {"w": TensorBox.whole(torch.full((3,), step))}, state={}, keep=keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10, 1_000_000):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-000010", "step-1000000"]
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [1_000_000, 10]
    save(tmp_path, 1_000_001, keep=None)
    assert len(names(tmp_path)) == 3
    save(tmp_path, 1_000_002, keep=1)
    assert names(tmp_path) == ["step-1000002"]


def test_a_broken_one_does_not_count_among_those_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "step-000003" / "rank-00000-of-00001.safetensors").unlink()
    save(tmp_path, 4)
    assert names(tmp_path) == ["step-000002", "step-000003", "step-000004"]  # 4 and 2 are the good ones
    save(tmp_path, 5)
    assert names(tmp_path) == ["step-000004", "step-000005"]


def test_a_save_behind_the_newest_is_never_its_own_victim(tmp_path):
    for step in (50, 60):
        save(tmp_path, step)
    save(tmp_path, 7)  # resumed by hand from an earlier step
    assert names(tmp_path) == ["step-000007", "step-000050", "step-000060"]
    assert verify_checkpoint(tmp_path / "step-000007") == []


def test_leftovers_of_dead_saves_go_and_the_users_own_files_stay(tmp_path):
    for name in ("step-000001.tmp-0a1b", "step-000001.trash-ff", "step-000001.tmp-mine", "notes", "step-1", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    (tmp_path / "readme.txt").write_text("x")
    save(tmp_path, 2)
    assert names(tmp_path) == ["best", "notes", "readme.txt", "step-000001.tmp-mine", "step-000002", "step-1"]


def test_a_checkpoint_set_aside_counts_until_its_successor_is_there(tmp_path):
    path = save(tmp_path, 5)
    aside = path.rename(tmp_path / "step-000005.old-0a1b")  # a kill between the two renames of a repeated save
    assert newest_checkpoint(tmp_path) == aside and checkpoint_step(aside) == 5
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-000005.old-0a1b", "step-000006"]
    save(tmp_path, 5)
    assert names(tmp_path) == ["step-000005", "step-000006"]


def test_one_that_was_set_aside_stays_beside_a_broken_successor(tmp_path):
    path = save(tmp_path, 5)
    aside = path.rename(tmp_path / "step-000005.old-0a1b")
    (tmp_path / "step-000005").mkdir()
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-000005", "step-000005.old-0a1b", "step-000006"]
    assert verify_checkpoint(aside) == []


def test_names_that_are_no_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path / "absent") == []
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        checkpoint_step("runs/latest")
