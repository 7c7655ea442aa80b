"""Start here when `verify` misses damage of a checkpoint, or reports damage where there is none."""

import os
import random
import shutil
import warnings

import pytest
import torch
import torch.distributed as dist

from fused_megatron.checkpoint import (
    CheckpointError,
    TensorBox,
    checkpoint_to_resume,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from fused_megatron.checks import InputError
from fused_megatron.testing import run_on_ranks

FILES = ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]


def values(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(6, 5, generator=generator),
        "bias": torch.randn(7, generator=generator).bfloat16(),
        "mask": torch.rand(5, generator=generator) < 0.5,
    }


def boxes(step, rank, world_size):
    result = {}
    for name, full in values(step).items():
        rows = len(full) // world_size
        start, stop = rank * rows, len(full) if rank == world_size - 1 else (rank + 1) * rows
        result[name] = TensorBox(full[start:stop], tuple(full.shape), (start,) + (0,) * (full.dim() - 1))
    return result


def save_two_steps(rank, world_size, folder):
    for step in (1, 2):
        rng = {"rng": torch.arange(9) + rank}
        save_checkpoint(
            folder, step, boxes(step, rank, world_size), state={"step": step}, rank_tensors=rng, group=dist.group.WORLD
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    run_on_ranks(save_two_steps, 2, str(folder))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def load(path):
    fulls = {name: TensorBox.whole(torch.zeros_like(full)) for name, full in values(1).items()}
    state = load_checkpoint(path, fulls)
    return state["step"], {name: box.tensor for name, box in fulls.items()}


def assert_loads(path, step):
    found, tensors = load(path)
    assert found == step
    for name, expected in values(step).items():
        assert torch.equal(tensors[name], expected)


def assert_refused(path):
    """Check that verify and every kind of load refuse the checkpoint."""
    problems = verify_checkpoint(path)
    assert problems and all(str(path) in p and "\n" not in p for p in problems)
    return problems


def test_good_ones_verify_and_load(folder):
    assert [path.name for path in list_checkpoints(folder)] == ["step-000002", "step-000001"]
    for step in (1, 2):
        assert verify_checkpoint(folder / f"step-00000{step}") == []
        assert_loads(folder / f"step-00000{step}", step)
    assert newest_checkpoint(folder) == folder / "step-000002"


def flip_everywhere(path, stride):
    """Flip one bit of every stride-th byte of every file in turn; verify and load must refuse all of them."""
    generator = random.Random(stride)
    count = 0
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for position in range(generator.randrange(stride), len(content), stride):
            damaged = bytearray(content)
            damaged[position] ^= 1 << generator.randrange(8)
            file.write_bytes(damaged)
            problems = assert_refused(path)
            assert file.name in problems[0]
            # A load on another number of ranks does not read the private tensors of a rank.
            if "rank tensor" not in problems[0]:
                with pytest.raises((CheckpointError, InputError)):
                    load(path)
            count += 1
        file.write_bytes(content)
    assert verify_checkpoint(path) == []
    return count


def test_a_flipped_bit_anywhere_is_found(folder):
    assert flip_everywhere(folder / "step-000002", 101) > 20


@pytest.mark.slow
def test_a_flipped_bit_in_every_byte_is_found(folder):
    assert flip_everywhere(folder / "step-000002", 1) > 2000


def test_a_flipped_bit_is_named_with_file_tensor_and_checksums(folder):
    path = folder / "step-000002" / FILES[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # one-byte dtypes come last in the file: the mask
    path.write_bytes(content)
    (problem,) = verify_checkpoint(path.parent)
    assert problem.startswith(f"{path}: tensor 'mask': its checksum is ") and "damaged" in problem


@pytest.mark.parametrize("name", ["manifest.json", *FILES])
def test_a_file_cut_short_or_longer_is_found(folder, name):
    file = folder / "step-000002" / name
    content = file.read_bytes()
    for length in [*range(0, len(content), max(1, len(content) // 40)), len(content) - 1]:
        file.write_bytes(content[:length])
        assert name in assert_refused(file.parent)[0]
    file.write_bytes(content + b"\0")
    assert name in assert_refused(file.parent)[0]


def pickle_of_code(marker):
    """Write os.system("touch marker") for an unpickler by hand, as a protocol-0 pickle."""
    return f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()


@pytest.mark.parametrize("name", ["manifest.json", *FILES])
@pytest.mark.parametrize("content", ["absent", "folder", "link", "pipe", "pickle", "zip"])
def test_anything_else_in_the_place_of_a_file_is_refused(folder, name, content, tmp_path):
    file = folder / "step-000002" / name
    kept = tmp_path / "kept"
    shutil.move(file, kept)
    if content == "folder":
        file.mkdir()
    elif content == "link":
        file.symlink_to(kept)
    elif content == "pipe":
        os.mkfifo(file)
    elif content == "pickle":
        file.write_bytes(pickle_of_code(tmp_path / "ran"))
    elif content == "zip":
        torch.save({"a": torch.zeros(3)}, file)
    assert name in assert_refused(file.parent)[0]
    with pytest.raises(CheckpointError):
        load(file.parent)
    assert not (tmp_path / "ran").exists()


def test_swapped_files_and_files_of_another_step_are_found(folder):
    one, two = folder / "step-000001", folder / "step-000002"
    first, second = (two / name for name in FILES)
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    assert len(assert_refused(two)) == 2
    first.write_bytes(contents[0])
    second.write_bytes((one / FILES[1]).read_bytes())
    (problem,) = assert_refused(two)
    assert FILES[1] in problem and "another step" in problem
    second.write_bytes(contents[1])
    (two / "manifest.json").write_bytes((one / "manifest.json").read_bytes())
    problems = assert_refused(two)
    assert "holds step 1" in problems[0]


def test_a_whole_checkpoint_under_the_name_of_another_step_is_found(folder):
    os.rename(folder / "step-000001", folder / "step-000009")
    assert "holds step 1" in assert_refused(folder / "step-000009")[0]
    with pytest.warns(RuntimeWarning, match="holds step 1"):
        assert newest_checkpoint(folder) == folder / "step-000002"
    os.rename(folder / "step-000009", folder / "best")  # a name that the user chose
    assert verify_checkpoint(folder / "best") == []


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_newest_good_one_is_taken_and_broken_ones_are_named(folder):
    damage(folder / "step-000002" / FILES[0])
    (folder / "step-000003").mkdir()
    (folder / "step-000004.tmp-00ff").mkdir()
    (folder / "notes").mkdir()
    with pytest.warns(RuntimeWarning) as caught:
        assert newest_checkpoint(folder) == folder / "step-000001"
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2
    assert "step-000003" in texts[0] and "manifest.json" in texts[0]
    assert FILES[0] in texts[1] and "tensor" in texts[1]
    damage(folder / "step-000001" / "manifest.json")
    with pytest.warns(RuntimeWarning):
        assert newest_checkpoint(folder) is None
    assert newest_checkpoint(folder / "absent") is None


@pytest.mark.parametrize("what", ["step-000002", "step-000002/manifest.json", f"step-000002/{FILES[1]}"])
def test_a_permission_lost_for_a_moment_is_no_damage(folder, what, without_roots_rights):
    (folder / what).chmod(0)
    with without_roots_rights():
        with pytest.warns(RuntimeWarning, match="cannot be read: Permission denied"):
            assert newest_checkpoint(folder) == folder / "step-000001"
        with pytest.warns(RuntimeWarning), pytest.raises(InputError, match="Permission denied: it may be good"):
            checkpoint_to_resume(folder)
        for step in (3, 4):
            save_checkpoint(folder, step, {"w": TensorBox.whole(torch.zeros(3))}, state={}, keep=1)
    assert [path.name for path in list_checkpoints(folder)] == ["step-000004", "step-000002"]
    (folder / what).chmod(0o777)
    assert verify_checkpoint(folder / "step-000002") == []


def test_a_folder_that_cannot_be_read_is_not_empty(folder, without_roots_rights):
    folder.chmod(0)
    with without_roots_rights():
        for search in (list_checkpoints, newest_checkpoint, checkpoint_to_resume):
            with pytest.raises(InputError, match="cannot be read: Permission denied"):
                search(folder)
    folder.chmod(0o777)


def test_no_run_begins_anew_beside_checkpoints_of_which_none_is_good(folder):
    assert checkpoint_to_resume(folder) == folder / "step-000002"
    damage(folder / "step-000002" / FILES[0])
    with pytest.warns(RuntimeWarning):
        assert checkpoint_to_resume(folder) == folder / "step-000001"
    shutil.rmtree(folder / "step-000001")
    (folder / "step-000001").symlink_to("a disk that is not mounted")
    with pytest.warns(RuntimeWarning), pytest.raises(InputError) as caught:
        checkpoint_to_resume(folder)
    said = str(caught.value)
    assert "has no checkpoint that is good (step-000002, step-000001; " in said and "tensor" in said
    assert checkpoint_to_resume(folder / "absent") is None


def newest_on_rank(rank, world_size, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = newest_checkpoint(folder, dist.group.WORLD)
    return path.name if path else None, [str(w.message) for w in caught]


def test_all_ranks_agree_on_the_newest(folder):
    damage(folder / "step-000002" / FILES[1])  # the file that rank 1 reads
    answers = run_on_ranks(newest_on_rank, 3, str(folder))
    assert [name for name, _ in answers] == ["step-000001"] * 3
    assert [len(messages) for _, messages in answers] == [1, 0, 0]
    assert FILES[1] in answers[0][1][0]
