"""Start here when fm.Accelerator clips, divides samples, saves or loads unlike Accelerate on one process."""

import os

import accelerate  # takes seconds: ranks are forked from a process that has it
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.testing import run_on_ranks

PLAN = {"tokens": "embedding_rowwise", "up": "colwise", "down": "rowwise", "head": "colwise_gather_output"}


class Model(nn.Module):
    def __init__(self, vocab_size=13, hidden_size=6):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.up, self.gelu, self.down = nn.Linear(hidden_size, 8), nn.GELU(), nn.Linear(8, hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size)

    def forward(self, tokens):
        x = self.tokens(tokens)
        return self.head(x + self.down(self.gelu(self.up(self.norm(x)))))


class Numbers(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.arange(index, index + 5) % 13


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Numbers())


def as_torchrun_does(rank, world_size):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})


def start(rank, world_size, size, zero_stage=None):
    """Make all that a loop needs. One process uses Accelerate itself."""
    as_torchrun_does(rank, world_size)
    torch.manual_seed(0)
    model = Model()
    # As in Accelerate, a scheduler steps once for each rank that divides the samples, unless batches are split.
    divided = accelerate.DataLoaderConfiguration(split_batches=world_size > size)
    options = {"cpu": True, "gradient_accumulation_steps": 2, "dataloader_config": divided}
    if world_size == 1:
        accelerator = accelerate.Accelerator(**options)
    else:
        mesh = fm.init_mesh(tensor_parallel_size=size)
        accelerator = fm.Accelerator(mesh, **options)
        if size > 1:
            fm.parallelize(model, mesh, PLAN)
    if zero_stage is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    else:
        fm.shard_data_parallel(model, mesh, zero_stage)
        optimizer = fm.ShardedOptimizer(model, torch.optim.AdamW, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    draw = torch.Generator().manual_seed(2)
    loader = DataLoader(Numbers(), batch_size=4, shuffle=True, generator=draw)
    return accelerator, *accelerator.prepare(model, optimizer, loader, scheduler)


def run_epoch(accelerator, model, optimizer, loader, scheduler):
    """Return the losses over all samples, and the gradient norms."""
    losses, norms = [], []
    for tokens in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), (3 * tokens + 1).flatten() % 13)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(float(accelerator.gather_for_metrics(loss.detach().view(1)).mean()))
    return losses, norms


def loops(rank, world_size, folder, name, size=1, zero_stage=None, loads=None):
    made = start(rank, world_size, size, zero_stage)
    accelerator = made[0]
    first = run_epoch(*made)
    accelerator.save_state(str(folder / name))
    accelerator.save_model(made[1], str(folder / f"{name}-weights"))
    second = run_epoch(*made)
    if loads is not None:
        accelerator.load_state(loads)
    again = None if loads is None else weights_of(accelerator.get_state_dict(made[1]))
    return first, second, again, accelerator.gather_for_metrics(torch.arange(3) + 3 * rank).tolist()


def weights_of(state):
    return {name: value.double().sum().item() for name, value in state.items()}


def assert_equal_loops(found, expected):
    for (losses, norms), (other_losses, other_norms) in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(losses, other_losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norms, other_norms, rtol=1e-5, atol=1e-6)


def assert_equal_files(folder, name, other, moments=True):
    for path in (f"{name}/model.safetensors", f"{name}-weights/model.safetensors"):
        found, expected = load_file(folder / path), load_file(folder / path.replace(name, other, 1))
        assert found.keys() == expected.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
    if moments:
        found, expected = (torch.load(folder / each / "optimizer.bin")["state"] for each in (name, other))
        assert found.keys() == expected.keys() and len(found) == 9
        for index, state in found.items():
            for key, value in state.items():
                torch.testing.assert_close(value, expected[index][key], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accelerator")
    (found,) = run_on_ranks(loops, 1, folder, "one", timeout_s=240)
    assert found[1][0][-1] < found[0][0][0] and max(found[0][1]) > 0.5
    return folder, found


LAYOUTS = [
    pytest.param(2, 2, None, marks=pytest.mark.slow),
    (4, 2, None),
    pytest.param(4, 2, 1, marks=pytest.mark.slow),
    pytest.param(4, 2, 3, marks=pytest.mark.slow),
    pytest.param(2, 1, 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world_size", "size", "zero_stage"), LAYOUTS)
def test_a_loop_keeps_losses_norms_and_files(one_process, world_size, size, zero_stage):
    """Also the states: load_state takes the state of the same layout, and that of one process."""
    folder, expected = one_process
    name = f"{world_size}-{size}-{zero_stage}"
    loads = str(folder / ("one" if zero_stage is None else name))
    found = run_on_ranks(loops, world_size, folder, name, size, zero_stage, loads, timeout_s=300)
    assert_equal_loops(found[0], expected)
    assert_equal_files(folder, name, "one", moments=zero_stage is None)
    saved = weights_of(load_file(f"{loads}/model.safetensors"))
    torch.testing.assert_close(found[0][2], saved, rtol=0, atol=0)
    copies = [3 * rank + i for rank in range(0, world_size, size) for i in range(3)]
    assert [each[3] for each in found] == [copies] * world_size


def schedules(rank, world_size):
    """Return the learning rates of a scheduler while it is stepped with and without a complete step."""
    as_torchrun_does(rank, world_size)
    accelerator = fm.Accelerator(fm.init_mesh(tensor_parallel_size=2), cpu=True, gradient_accumulation_steps=2)
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    halves = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer, scheduler = accelerator.prepare(optimizer, halves)
    rates = []
    for _ in range(4):
        with accelerator.accumulate():
            accelerator.backward(weight.sum())
            optimizer.step()
            scheduler.step()
            rates.append(scheduler.get_last_lr()[0])
    return rates


def test_a_scheduler_steps_once_for_each_data_parallel_rank():
    assert run_on_ranks(schedules, 2) == [[1.0, 0.5, 0.5, 0.25]] * 2
    assert run_on_ranks(schedules, 4) == [[1.0, 0.25, 0.25, 0.0625]] * 4


def misuse(rank, world_size):
    as_torchrun_does(rank, world_size)
    mesh = fm.init_mesh(tensor_parallel_size=2)
    accelerator = fm.Accelerator(mesh, cpu=True)
    torch.manual_seed(0)
    model = accelerator.prepare(fm.parallelize(Model(), mesh, PLAN))
    with pytest.raises(InputError, match=r"clip_grad_norm_ of 1 of the model's 9 parameters: .*pass model.parameters"):
        accelerator.clip_grad_norm_([model.head.weight if world_size == 2 else model.module.head.weight], 1.0)
    if world_size == 4:
        with pytest.raises(InputError, match=r"an IterableDataset over data-parallel ranks needs dispatch_batches=Fal"):
            accelerator.prepare(DataLoader(Stream(), batch_size=2))
        assert len({str(batch) for batch in accelerator.prepare(DataLoader(Numbers(), batch_size=2))}) == 6
    torch.manual_seed(0)
    other = fm.parallelize(Model(), fm.init_mesh(tensor_parallel_size=world_size), PLAN)
    if world_size == 4:
        with pytest.raises(InputError, match=r"tensor-parallel ranks \[0, 1, 2, 3\] must be neighbours among ranks"):
            accelerator.prepare(other)
        with pytest.raises(InputError, match=r"pipeline_parallel_size=2: Accelerate runs whole models"):
            fm.Accelerator(fm.init_mesh(pipeline_parallel_size=2))
    objects = accelerator.gather_for_metrics([f"text of {rank}"], use_gather_object=True)
    assert objects == [f"text of {first}" for first in range(0, world_size, 2)]


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_mistakes_end_in_one_line(world_size):
    run_on_ranks(misuse, world_size, timeout_s=240)
