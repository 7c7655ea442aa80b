"""Start here when saving fails, leaves an incomplete folder, or deletes a checkpoint that it should keep."""

import ast
import json
import os
import resource
import shutil
import signal
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fused_megatron
from fused_megatron.checkpoint import (
    BackgroundSave,
    CheckpointError,
    TensorBox,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    read_manifest,
    save_checkpoint,
    verify_checkpoint,
)
from fused_megatron.checks import InputError
from fused_megatron.testing import RankError, run_on_ranks

# Calls that change the disk, or the order of changes. A kill right before each of them, and in the middle of each
# write, produces every state that a killed save can leave.
DISK_CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")


def fulls(version):
    generator = torch.Generator().manual_seed(version)
    return {"weight": torch.randn(4, 3, generator=generator), "scale": torch.randn(2, generator=generator)}


def boxes(version, rank, world_size):
    """Return boxes: the rows of the weight are sharded, the scale is replicated."""
    weight, scale = fulls(version).values()
    rows = 4 // world_size
    mine = TensorBox(weight[rank * rows : (rank + 1) * rows], (4, 3), (rank * rows, 0))
    return {"weight": mine, "scale": TensorBox.whole(scale)}


def save(folder, version, step, rank, world_size, keep=1, background=False):
    tensors, group = boxes(version, rank, world_size), dist.group.WORLD if dist.is_initialized() else None
    options = {"state": {"version": version}, "rank_tensors": {"rng": torch.full((2,), version)}, "keep": keep}
    if not background:
        return save_checkpoint(folder, step, tensors, group=group, **options)
    saver = BackgroundSave(group)
    saver.start(folder, step, tensors, **options)
    saver.finish()
    return None


def version_in(folder):
    """Return the version in the newest good checkpoint, after comparing every value; None: there is no checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a killed save leaves nothing broken under the name of a checkpoint
        path = newest_checkpoint(folder)
    if path is None:
        return None
    loaded = {name: TensorBox.whole(torch.zeros_like(full)) for name, full in fulls(0).items()}
    version = load_checkpoint(path, loaded)["version"]
    for name, full in fulls(version).items():
        assert torch.equal(loaded[name].tensor, full)
    return version


def hook_disk_calls(before):
    """Call before(name, arguments) ahead of every call that changes the disk."""

    def wrapped(name, function):
        def call(*arguments, **keywords):
            if name != "open" or arguments[1] & os.O_CREAT:
                before(name, arguments)
            return function(*arguments, **keywords)

        return call

    for name in DISK_CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))


def save_and_die(rank, world_size, folder, step, victim, point, background):
    """Save version 2; the victim is killed at its point-th call. Return the number of calls on this rank."""
    calls, write = [], os.write

    def before(name, arguments):
        calls.append(name)
        if rank == victim and len(calls) == point + 1:
            if name == "write":
                write(arguments[0], arguments[1][: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    hook_disk_calls(before)
    save(folder, 2, step, rank, world_size, background=background)
    return len(calls)


# A first save; one after which an older checkpoint is deleted; one that replaces a checkpoint of the same step.
SCENES = {"first": (None, 7), "next": (6, 7), "again": (7, 7)}


def prepare(folder, scene):
    before, step = SCENES[scene]
    if before is not None:
        run_on_ranks(save_version_1, 2, str(folder), before)
    return step


def save_version_1(rank, world_size, folder, step):
    save(folder, 1, step, rank, world_size)


def sweep(base, scene, stride, background):
    """Kill each rank at every stride-th of its disk calls in turn; return the number of kills."""
    prepared = base / "prepared"
    prepared.mkdir()
    step = prepare(prepared, scene)
    old = version_in(prepared)
    dry = shutil.copytree(prepared, base / "dry")
    num_calls = run_on_ranks(save_and_die, 2, str(dry), step, -1, -1, background)
    assert version_in(dry) == 2 and len(list_checkpoints(dry)) == 1
    found = []
    for victim in (0, 1):
        for point in range(victim % stride, num_calls[victim], stride):
            folder = shutil.copytree(prepared, base / f"{victim}-{point}")
            with pytest.raises(RankError, match=f"rank {victim} died with exit code -9") as caught:
                run_on_ranks(save_and_die, 2, str(folder), step, victim, point, background)
            error = caught.value.errors.get(1 - victim)
            assert isinstance(error, CheckpointError) and "another rank stopped" in str(error)
            found.append(version_in(folder))
            assert found[-1] in (old, 2), (victim, point)
            assert all(verify_checkpoint(path) == [] for path in list_checkpoints(folder)), (victim, point)
            save(folder, 3, 8, 0, 1)  # the next save succeeds and removes the remains of the killed one
            assert version_in(folder) == 3 and [path.name for path in folder.iterdir()] == ["step-000008"]
            shutil.rmtree(folder)
    assert set(found) == {old, 2}, "the sweep must see both outcomes"
    return len(found)


@pytest.mark.parametrize("background", [False, True], ids=["save", "background"])
@pytest.mark.parametrize(
    ("scene", "few"), [("next", True), *(pytest.param(scene, False, marks=pytest.mark.slow) for scene in SCENES)]
)
def test_a_kill_at_any_moment_of_a_save_leaves_the_old_or_the_new(tmp_path, scene, few, background):
    stride = (8 if background else 5) if few else 1
    assert sweep(tmp_path, scene, stride, background) * stride >= 15


def test_all_is_on_disk_before_the_rename_and_nothing_goes_before_it_is(tmp_path):
    save(tmp_path, 1, 6, 0, 1)
    events = []

    def before(name, arguments):
        target = arguments[0]
        events.append((name, os.readlink(f"/proc/self/fd/{target}") if name in ("write", "fsync") else str(target)))

    originals = {name: getattr(os, name) for name in DISK_CALLS}
    try:
        hook_disk_calls(before)
        final = save(tmp_path, 2, 7, 0, 1)
    finally:
        for name, function in originals.items():
            setattr(os, name, function)
    renames = [i for i, event in enumerate(events) if event[0] == "rename"]
    publish = renames[0]
    temporary = events[publish][1]
    assert ".tmp-" in temporary
    for name in os.listdir(final):
        path = f"{temporary}/{name}"
        writes = [i for i, event in enumerate(events) if event == ("write", path)]
        assert writes and writes[-1] < events.index(("fsync", path)) < publish
    manifest_written = events.index(("write", f"{temporary}/manifest.json"))
    assert all(i < manifest_written for i, e in enumerate(events) if e[0] == "fsync" and e[1].endswith("safetensors"))
    assert manifest_written < events.index(("fsync", temporary)) < publish
    published = events.index(("fsync", str(tmp_path)))
    assert published > publish
    gone = [i for i, event in enumerate(events) if event[0] in ("unlink", "rmdir") or "step-000006" in event[1]]
    assert gone and min(gone) > published


def test_a_second_save_of_a_step_replaces_it(tmp_path):
    for version in (1, 2):
        path = save(tmp_path, version, 5, 0, 1)
    assert version_in(tmp_path) == 2 and list(tmp_path.iterdir()) == [path]
    (path / "manifest.json").write_text("broken")
    save(tmp_path, 3, 5, 0, 1)
    assert version_in(tmp_path) == 3 and list(tmp_path.iterdir()) == [path]


def held_boxes(rank, world_size, folder):
    """Return eight replicated tensors and one that two pairs of ranks hold by halves."""
    tensors = {f"r{i}": TensorBox.whole(torch.full((100,), float(i))) for i in range(8)}
    tensors["half"] = TensorBox(torch.full((200,), float(rank % 2)), (400,), (200 * (rank % 2),))
    return str(save_checkpoint(folder, 1, tensors, state={}, group=dist.group.WORLD))


def test_each_box_is_written_once_and_the_writing_is_shared_out(tmp_path):
    path = Path(run_on_ranks(held_boxes, 4, str(tmp_path))[0])
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    assert len(sizes) == 4
    total = (8 * 100 + 400) * 4
    assert total <= sum(sizes) < total + 4 * 1000  # headers
    assert max(sizes) - min(sizes) < 0.5 * total / 4
    stored = read_manifest(path).tensors["half"]
    assert [b.box.offset for b in stored.boxes] == [(0,), (200,)]


def uneven_boxes(rank, world_size, folder, kind):
    start, length = {"hole": (4 * rank, 3), "overlap": (3 * rank, 4), "beyond": (4 * rank, 5)}.get(kind, (4 * rank, 4))
    shape = (8 + rank,) if kind == "shape" else (7,) if kind == "overlap" else (8,)
    dtype = torch.float64 if kind == "dtype" and rank else torch.float32
    save_checkpoint(
        folder,
        1,
        {"w": TensorBox(torch.zeros(length, dtype=dtype), shape, (start,))},
        state={},
        group=dist.group.WORLD,
    )


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("hole", "2 of 8 elements are in no box"),
        ("overlap", r"the box at \(0,\) of shape \(4,\) and the box at \(3,\) of shape \(4,\) overlap"),
        ("beyond", "must lie in full_shape"),
        ("shape", r"\(8,\) on rank 0, but float32 of \(9,\) on rank 1"),
        ("dtype", r"float32 of full shape \(8,\) on rank 0, but float64"),
    ],
)
def test_boxes_that_do_not_fit_together_are_refused_on_every_rank(tmp_path, kind, text):
    with pytest.raises(RankError) as caught:
        run_on_ranks(uneven_boxes, 2, str(tmp_path), kind)
    errors = list(caught.value.errors.values())
    assert len(errors) == 2 and str(errors[0]) == str(errors[1]) and isinstance(errors[0], InputError)
    with pytest.raises(InputError, match=text):
        raise errors[0]
    assert list(tmp_path.iterdir()) == []


def save_different_steps(rank, world_size, folder):
    save_checkpoint(folder, 5 + rank, boxes(1, rank, 2), state={}, group=dist.group.WORLD)


def test_ranks_that_are_not_at_the_same_step_are_refused(tmp_path):
    with pytest.raises(RankError, match=r"step=\[5, 6\] by rank") as caught:
        run_on_ranks(save_different_steps, 2, str(tmp_path))
    assert all(isinstance(error, InputError) for error in caught.value.errors.values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"step": -1}, "step=-1"),
        ({"keep": 0}, "keep=0"),
        ({"tensors": {"rank_tensors/x": TensorBox.whole(torch.zeros(1))}}, "is taken"),
        ({"tensors": {"x": TensorBox.whole(torch.zeros(1, dtype=torch.complex128))}}, "cannot hold torch.complex128"),
    ],
)
def test_bad_arguments(tmp_path, arguments, text):
    arguments = {"step": 1, "tensors": {}, "state": {}} | arguments
    with pytest.raises(InputError, match=text):
        save_checkpoint(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def big_boxes(rank):
    return {f"big{rank}": TensorBox.whole(torch.ones(250_000))}


def save_under_a_file_size_limit(rank, world_size, folder):
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    save_checkpoint(folder, 9, big_boxes(rank) | boxes(2, rank, 2), state={}, group=dist.group.WORLD)


def fill_the_disk(folder):
    with open(os.path.join(folder, "filler"), "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 65536)
        except OSError:
            pass


def save_while_another_fills_the_disk(rank, world_size, folder):
    def before(name, arguments):
        if rank == 1 and name == "write" and not os.path.exists(os.path.join(folder, "..", "filler")):
            fill_the_disk(os.path.join(folder, ".."))

    hook_disk_calls(before)
    save_checkpoint(folder, 9, big_boxes(rank) | boxes(2, rank, 2), state={}, group=dist.group.WORLD)


def assert_failed_alike(folder, function, text):
    with pytest.raises(RankError) as caught:
        run_on_ranks(function, 2, str(folder))
    errors = list(caught.value.errors.values())
    assert len(errors) == 2 and str(errors[0]) == str(errors[1])
    with pytest.raises(CheckpointError, match=text):
        raise errors[0]
    assert "\n" not in str(errors[0])
    assert [path.name for path in folder.iterdir()] == ["step-000006"] and version_in(folder) == 1


def test_a_file_that_cannot_grow_is_named_on_every_rank(tmp_path):
    prepare(tmp_path, "next")
    text = r"rank 1: rank-00001-of-00002\.safetensors of .* not written: file too large: needs 1\.0 MB"
    assert_failed_alike(tmp_path, save_under_a_file_size_limit, text)


def save_beyond_the_disk(rank, world_size, folder):
    save_checkpoint(folder, 9, {"x": TensorBox.whole(torch.ones(3_000_000))}, state={}, group=dist.group.WORLD)


@pytest.fixture
def small_disk(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_says_so_on_every_rank_and_the_last_checkpoint_stays(small_disk):
    folder = small_disk / "checkpoints"
    prepare(folder, "next")
    # Detected before anything is written:
    assert_failed_alike(folder, save_beyond_the_disk, r"not saved: disk full: needs 13\.\d MB, [56]\.\d MB free on")
    # Detected in the middle of a write, since another process fills the disk meanwhile:
    text = r"rank \d: rank-0000\d-of-00002\.safetensors of .* not written: disk full: needs 1\.0 MB, 0\.0 MB free on"
    assert_failed_alike(folder, save_while_another_fills_the_disk, text)
    (small_disk / "filler").unlink()
    save(folder, 2, 9, 0, 1)
    assert version_in(folder) == 2


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match="step-000001 not saved"):
        save(tmp_path / "run", 1, 1, 0, 1)


def test_nothing_in_the_package_reads_or_writes_pickles():
    """No line imports or calls a pickling function, but in testing/, which exchanges pickles with its own processes."""
    modules = {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    torch_functions = {"load", "save"}
    collectives = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"}
    root = Path(fused_megatron.__file__).parent
    files = [path for path in root.rglob("*.py") if "testing" not in path.relative_to(root).parts]
    assert len(files) > 10
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = set()
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names} & modules
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]} & modules
                names |= {alias.name for alias in node.names} & (collectives | modules)
                names |= {a.name for a in node.names} & torch_functions if node.module == "torch" else set()
            elif isinstance(node, ast.Attribute):
                names = {node.attr} & collectives
                if isinstance(node.value, ast.Name) and node.value.id == "torch":
                    names |= {node.attr} & torch_functions
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                names = {"allow_pickle"}
            assert not names, f"{path}:{node.lineno}: {names}"


def test_the_files_are_safetensors_and_json_alone(tmp_path):
    path = save(tmp_path, 1, 6, 0, 1)
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "rank-00000-of-00001.safetensors"]
    json.loads((path / "manifest.json").read_text())
    assert verify_checkpoint(path) == []
