"""Start here when a checkpoint does not load, or loads other values than were saved."""

import resource
import warnings

import pytest
import torch
import torch.distributed as dist

from fused_megatron.checkpoint import (
    CheckpointError,
    TensorBox,
    load_checkpoint,
    newest_checkpoint,
    read_manifest,
    save_checkpoint,
)
from fused_megatron.checkpoint.model_state import optimizer_boxes, parameter_boxes
from fused_megatron.checks import InputError
from fused_megatron.collectives.together import gather_json
from fused_megatron.config import GPTConfig
from fused_megatron.mesh import init_mesh
from fused_megatron.models import GPT
from fused_megatron.sharding import full_tensor
from fused_megatron.testing import RankError, run_on_ranks

SHAPES = {
    "matrix": ((10, 7), torch.float32),
    "vector": ((11,), torch.bfloat16),
    "block": ((3, 4, 5), torch.float64),
    "replicated": ((6, 2), torch.float16),
    "scalar": ((), torch.int64),
    "empty": ((0, 4), torch.float32),
    "mask": ((9, 3), torch.bool),
    "short": ((2, 3), torch.float32),  # more ranks than rows
}


def full_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)
        for name, (shape, dtype) in SHAPES.items()
    }


def span(size, part, num_parts):
    """Return a part of uneven parts; with more parts than elements some are empty."""
    weights = [i + 1 for i in range(num_parts)]
    cuts = [size * sum(weights[:i]) // sum(weights) for i in range(num_parts + 1)]
    return cuts[part], cuts[part + 1] - cuts[part]


def grid_of(name, world_size):
    """Return the number of parts of each dim, cut as data and tensor parallelism would, for this world size."""
    dims = len(SHAPES[name][0])
    if name in ("replicated", "scalar", "empty"):
        return (1,) * dims
    if name == "matrix" and world_size == 4:
        return (2, 2)
    if name == "block":
        return (1, 1, world_size)
    if name == "mask":
        return (2 if world_size == 4 else 1, 1)  # two replicas of each half
    return (world_size, *(1,) * (dims - 1))


def box_of(name, rank, world_size, full):
    grid, part, offset, shape = grid_of(name, world_size), rank, [], []
    for size, num_parts in zip(full.shape, grid, strict=True):
        start, length = span(size, part % num_parts, num_parts)
        part //= num_parts
        offset.append(start)
        shape.append(length)
    index = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
    if 0 in shape:
        offset[0] += 64  # an empty box may begin anywhere
    return TensorBox(full[index], tuple(full.shape), tuple(offset))


def boxes_of(rank, world_size, fulls):
    return {name: box_of(name, rank, world_size, full) for name, full in fulls.items()}


def empty_like(boxes):
    """Return destinations; every second one is not contiguous."""
    result = {}
    for i, (name, box) in enumerate(boxes.items()):
        base = torch.full((*box.tensor.shape, 2), 99).to(box.tensor.dtype)
        tensor = base[..., 0] if i % 2 else base[..., 0].clone()
        result[name] = TensorBox(tensor, box.full_shape, box.offset)
    return result


def load_and_save(rank, world_size, folder, step):
    """Load the checkpoint of the last layout, compare it, and save it in this layout as the next step."""
    boxes = boxes_of(rank, world_size, full_tensors(5))
    if step > 1:
        loaded = empty_like(boxes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = newest_checkpoint(folder, dist.group.WORLD)
            rng = torch.full((4,), -1)
            state = load_checkpoint(path, loaded, rank_tensors={"rng": rng}, group=dist.group.WORLD)
        assert path.name == f"step-{step - 1:06d}"
        assert state == {"lr": 0.1 + 0.2, "text": "é\n", "layout": [1, 2], "none": None}
        assert rng.tolist() == [-1] * 4  # saved by another number of ranks
        for name, box in boxes.items():
            assert torch.equal(loaded[name].tensor, box.tensor), name
        boxes = loaded
    state = {"lr": 0.1 + 0.2, "text": "é\n", "layout": (1, 2), "none": None}
    rng = torch.arange(4) + 10 * rank
    path = save_checkpoint(folder, step, boxes, state=state, rank_tensors={"rng": rng}, group=dist.group.WORLD)
    again = torch.zeros(4, dtype=torch.int64)
    load_checkpoint(path, empty_like(boxes), rank_tensors={"rng": again}, group=dist.group.WORLD)
    assert torch.equal(again, rng)


def test_any_layout_loads_what_any_other_saved(tmp_path):
    for step, world_size in enumerate([4, 2, 3, 1, 4], start=1):
        run_on_ranks(load_and_save, world_size, str(tmp_path), step)
    full = {name: TensorBox.whole(torch.empty(shape).to(dtype)) for name, (shape, dtype) in SHAPES.items()}
    load_checkpoint(newest_checkpoint(tmp_path), full)
    for name, expected in full_tensors(5).items():
        assert torch.equal(full[name].tensor, expected), name


@pytest.fixture
def saved(tmp_path):
    tensors = {"weight": TensorBox.whole(torch.randn(4, 3)), "bias": TensorBox.whole(torch.randn(4))}
    return save_checkpoint(tmp_path, 3, tensors, state={"a": 1}, rank_tensors={"rng": torch.arange(5)})


def wanted(**changes):
    tensors = {"weight": torch.zeros(4, 3), "bias": torch.zeros(4)}
    tensors |= changes
    return {name: TensorBox.whole(tensor) for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": torch.zeros(4, 5)},
            r"'weight' is float32 of shape \(4, 3\), but this run needs float32 of shape \(4, 5\)",
        ),
        ({"weight": torch.zeros(4, 3).double()}, r"'weight' is float32 of shape \(4, 3\), but this run needs float64"),
        (
            {"weight": torch.zeros(12)},
            r"'weight' is float32 of shape \(4, 3\), but this run needs float32 of shape \(12,\)",
        ),
        ({"extra": torch.zeros(1)}, r"'extra' \(float32 of shape \(1,\)\) is not in the checkpoint"),
        ({"bias": None}, r"'bias' \(float32 of shape \(4,\)\) is in the checkpoint, but this run does not use it"),
    ],
)
def test_a_checkpoint_of_another_model_is_named(saved, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(saved, wanted(**changes))
    assert "another model" in str(caught.value) and str(saved) in str(caught.value) and "\n" not in str(caught.value)


def test_all_misfits_are_counted(saved):
    with pytest.raises(InputError, match="and 1 more tensors"):
        load_checkpoint(saved, wanted(weight=torch.zeros(2), bias=torch.zeros(2)))


def test_missing_and_extra_names_only_where_asked(saved):
    tensors = wanted(bias=None, **{"momentum.bias": torch.full((2,), 7.0)})
    with pytest.raises(InputError, match="this run does not use it"):
        load_checkpoint(saved, tensors, allow_missing=["momentum.*"])
    with pytest.raises(InputError, match="is not in the checkpoint"):
        load_checkpoint(saved, tensors, allow_extra=["bias"])
    assert load_checkpoint(saved, tensors, allow_missing=["momentum.*"], allow_extra=["b*"]) == {"a": 1}
    assert tensors["momentum.bias"].tensor.tolist() == [7, 7]


def test_a_box_beyond_its_full_tensor_is_refused(saved):
    tensors = wanted() | {"bias": TensorBox(torch.zeros(3), (4,), (2,))}
    with pytest.raises(InputError, match="must lie in full_shape"):
        load_checkpoint(saved, tensors)


def test_rank_tensors_are_strict(saved):
    with pytest.raises(InputError, match=r"'dice' .* of rank 0 is not in the checkpoint"):
        load_checkpoint(saved, wanted(), rank_tensors={"dice": torch.zeros(5)})
    with pytest.raises(
        InputError, match=r"'rng' of rank 0 is int64 of shape \(5,\), but this run needs int64 of shape \(6,\)"
    ):
        load_checkpoint(saved, wanted(), rank_tensors={"rng": torch.zeros(6, dtype=torch.int64)})
    rng = torch.zeros(5, dtype=torch.int64)
    load_checkpoint(saved, wanted(), rank_tensors={"rng": rng})
    assert rng.tolist() == [0, 1, 2, 3, 4]
    manifest = read_manifest(saved)
    assert (manifest.step, manifest.world_size, manifest.state) == (3, 1, {"a": 1})


def test_parameters_that_require_grad_are_written_in_place(saved):
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    load_checkpoint(saved, wanted() | {"weight": TensorBox.whole(weight)})
    assert weight.requires_grad and weight.is_leaf and weight.abs().sum() > 0


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "step-000009", wanted())


def load_misfit(rank, world_size, path):
    tensors = wanted(weight=torch.zeros(4, 3 + rank))
    load_checkpoint(path, tensors, group=dist.group.WORLD)


def test_a_misfit_on_one_rank_is_the_same_error_on_all(saved):
    with pytest.raises(RankError) as caught:
        run_on_ranks(load_misfit, 2, str(saved))
    texts = {(type(error), str(error)) for error in caught.value.errors.values()}
    assert len(texts) == 1 and len(caught.value.errors) == 2
    (kind, text), *_ = texts
    assert issubclass(kind, InputError) and text.startswith("rank 1:") and "'weight'" in text


def peak_growth(rank, world_size, folder):
    first = {"w": TensorBox.whole(torch.ones(64, 2)[:, ::2])}
    load_checkpoint(save_checkpoint(folder, 1, first, state={}), first)  # the first use of the code takes memory, too
    wide = torch.ones(2048, 2 * 4096)
    source = {"w": TensorBox.whole(wide[:, ::2])}  # not contiguous, 32 MB
    target = {"w": TensorBox(torch.ones(1024, 4096), (2048, 4096), (512, 0))}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = save_checkpoint(folder, 2, source, state={})
    load_checkpoint(path, target)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_no_copy_of_a_whole_tensor_is_held(tmp_path):
    # Blocks of 4 MiB, a few at a time, and some unused memory of the allocator; a copy of the tensor would take 32 MB.
    assert run_on_ranks(peak_growth, 1, str(tmp_path))[0] < 12e6


def whole_tensors(model, tp_group):
    return {name: full_tensor(p, p, tp_group) for name, p in model.named_parameters()}


def model_of(vocab_size, tp, seed):
    mesh = init_mesh(tensor_parallel_size=tp)
    config = GPTConfig(num_layers=1, hidden_size=48, num_heads=12, seq_len=8, vocab_size=vocab_size)
    model = GPT(config, layout=mesh.layout(), seed=seed)
    parameters = dict(model.named_parameters())
    moments = {name: {"exp_avg": torch.randn_like(p)} for name, p in parameters.items()}
    return model, mesh.tp_group, {**parameter_boxes(parameters), **optimizer_boxes(parameters, moments)}


def save_and_load_with_padding_only(rank, world_size, folder, cases):
    for vocab_size, tp, others in cases:
        model, group, boxes = model_of(vocab_size, tp, seed=1)
        assert any(n == 0 for n in gather_json(boxes["model.token_embedding.weight"].box.volume, group))
        path = save_checkpoint(folder / f"{vocab_size}", 1, boxes, state={}, group=dist.group.WORLD)
        saved = whole_tensors(model, group)
        for size in (tp, *others):
            loaded, loaded_group, targets = model_of(vocab_size, size, seed=2)
            load_checkpoint(path, targets, group=dist.group.WORLD)
            found = whole_tensors(loaded, loaded_group)
            assert found.keys() == saved.keys()
            assert all(torch.equal(found[name], value) for name, value in saved.items())


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (4, [(33, 2, (1, 4)), (257, 4, (2,))]),
        (3, [(389, 3, (1,))]),
    ],
    ids=["4 ranks", "3 ranks"],
)
def test_ranks_of_which_some_hold_only_padding(tmp_path, ranks, cases):
    """They save and load the model and the optimizer at the saved tensor-parallel size and at another."""
    run_on_ranks(save_and_load_with_padding_only, ranks, tmp_path, cases, timeout_s=100)
