"""Start here when a ShardedOptimizer makes another update than the torch optimizer that it is made of."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fused_megatron as fm
from fused_megatron.data_parallel.fixed_sizes import aligned
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks, run_on_ranks


class Net(nn.Module):
    """Two blocks whose sizes two and three ranks do not divide."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(5, 5, dtype=dtype) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def samples(step: int, rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)


def backward(model: nn.Module, x: torch.Tensor) -> None:
    model(x).float().square().mean().backward()


def averaged(ranks: int, dtype: torch.dtype, optimizer: Any, groups: Any, options: Any, steps: int) -> list[nn.Module]:
    """Train as DistributedDataParallel would: every replica's gradient, summed in float32 in rank order and divided.

    Weights of lower precision are rounded from float32 weights. Returns the model after each step.
    """
    model = Net(dtype)
    main = Net()
    main.load_state_dict(model.state_dict())
    names = dict(main.named_parameters())
    made = [{**group, "params": [names[name] for name in group["params"]]} for group in groups]
    inner = optimizer(made or main.parameters(), **options)
    found = []
    for step in range(steps):
        for p in main.parameters():
            p.grad = torch.zeros_like(p)
        for rank in range(ranks):
            model.zero_grad()
            backward(model, samples(step, rank, dtype))
            for p, low in zip(main.parameters(), model.parameters(), strict=True):
                p.grad += low.grad.float()
        for p in main.parameters():
            p.grad /= ranks
        inner.step()
        model.load_state_dict(main.state_dict())
        found.append(copy.deepcopy(model))
    return found


GROUPS = [{"params": ["blocks.1.weight"], "lr": 0.3}, {"params": ["blocks.0.weight", "blocks.0.bias"]}]
CASES: list[tuple[Any, ...]] = [
    (1, torch.float32, torch.optim.AdamW, [], {"lr": 0.1}),
    (2, torch.bfloat16, torch.optim.AdamW, [], {"lr": 0.1}),
    (3, torch.float32, torch.optim.SGD, GROUPS, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (3, torch.bfloat16, torch.optim.RMSprop, [], {"lr": 0.01}),
    (2, torch.float32, torch.optim.NAdam, GROUPS, {"lr": 0.1}),
]


def updated(rank: int, world_size: int, *case: Any) -> list[bool]:
    """Return after each step whether the weights equal an update from averaged gradients, bit for bit.

    After the first step a new model and optimizer take over what state_dict and full_state_dict returned.
    """
    stage, dtype, optimizer, groups, options = case
    wanted = averaged(world_size, dtype, optimizer, groups, options, 3)
    mesh = fm.init_mesh()
    model = fm.shard_data_parallel(Net(dtype), mesh, stage, bucket_mb=1e-4)
    made = fm.ShardedOptimizer(model, optimizer, groups or None, **options)
    same = []
    for step in range(3):
        backward(model, samples(step, rank, dtype))
        made.step()
        made.zero_grad()
        weights = fm.full_state_dict(model)
        same.append(all(torch.equal(weights[name], value) for name, value in wanted[step].state_dict().items()))
        if step == 0:
            fresh = fm.shard_data_parallel(Net(dtype), mesh, stage, bucket_mb=1e-4)
            fm.load_full_state_dict(fresh, weights)
            again = fm.ShardedOptimizer(fresh, optimizer, groups or None, **{**options, "lr": 9.0})
            again.load_state_dict(copy.deepcopy(made.state_dict()))
            model, made = fresh, again
    with torch.no_grad():
        same.append(torch.equal(model(samples(9, 0, dtype)), wanted[-1](samples(9, 0, dtype))))
    return same


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_updates_have_the_bits_of_averaged_gradients(ranks: int) -> None:
    for case, by_rank in zip(CASES, run_cases_on_ranks(updated, ranks, CASES), strict=True):
        assert by_rank == [[True] * 4] * ranks, case


def state_of_other_rows(rank: int, world_size: int) -> str:
    mesh = fm.init_mesh()
    model = fm.shard_data_parallel(Net(), mesh, 2)
    optimizer = fm.ShardedOptimizer(model, torch.optim.SGD)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0  # as a scheduler would
    before = fm.full_state_dict(model)
    backward(model, samples(0, rank))
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in fm.full_state_dict(model).items())
    state: list[Any] = [None] * world_size
    dist.all_gather_object(state, optimizer.state_dict())
    with pytest.raises(fm.checks.InputError) as raised:
        optimizer.load_state_dict(state[1 - rank])
    return str(raised.value)


def test_state_of_another_rank_is_refused() -> None:
    assert run_on_ranks(state_of_other_rows, 2)[0] == (
        "the state has the rows 1 of 2, and this rank 0 of 2 (full_state_dict() and load_full_state_dict() work in any "
        "layout)"
    )


class Scaled(Net):
    """Has a 0-dim parameter, which looks like the number of steps of its own state."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


def continued(
    rank: int, world_size: int, stage: int, shard_size: int | None, steps: range, before: tuple[Any, Any] | None
) -> tuple[Any, Any]:
    """Do some steps, after those of another layout; return the weights and the optimizer's state."""
    mesh = fm.init_mesh()
    model = fm.shard_data_parallel(Scaled(torch.bfloat16), mesh, stage, shard_size=shard_size)
    optimizer = fm.ShardedOptimizer(model, torch.optim.NAdam, lr=0.1 if before is None else 9.0)
    if before is not None:
        fm.load_full_state_dict(model, before[0])
        optimizer.load_full_state_dict(before[1])
    for step in steps:
        backward(model, samples(step, 0, torch.bfloat16))
        optimizer.step()
        optimizer.zero_grad()
    return fm.full_state_dict(model), optimizer.full_state_dict(rank0_only=True)


def test_state_goes_on_in_another_layout() -> None:
    first, *others = run_on_ranks(continued, 3, 1, None, range(2), None)
    assert all(state == {} for _, state in others)
    (wanted, state), *_ = run_on_ranks(continued, 3, 1, None, range(4), None)
    assert state["state"]["blocks.0.weight"]["main"].dtype == torch.float32
    assert state["state"]["scale"]["step"] == 4
    for ranks, stage, shard_size in ((2, 3, None), (1, 2, None), (4, 2, 2)):
        (found, other), *_ = run_on_ranks(continued, ranks, stage, shard_size, range(2, 4), first)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        for name, values in state["state"].items():
            for key, value in values.items():
                torch.testing.assert_close(other["state"][name][key], value, rtol=1e-6, atol=1e-7)


def sent(rank: int, world_size: int, stage: int) -> dict[str, list[int]]:
    """Return bytes sent by three accumulated backwards, the last of which completes the gradients, and by a step."""
    mesh = fm.init_mesh()
    model: Any = fm.shard_data_parallel(Net(), mesh, stage)
    optimizer = fm.ShardedOptimizer(model, torch.optim.SGD, lr=0.1)
    found: dict[str, list[int]] = {"reduce_scatter": [], "all_gather": []}
    for i in range(4):
        with record_communication() as ledger:
            if i == 3:
                optimizer.step()
                model(samples(0, rank))
            elif i == 2:
                backward(model, samples(i, rank))
            else:
                with model.no_sync():
                    backward(model, samples(i, rank))
        for kind, numbers in found.items():
            numbers.append(ledger.num_bytes[kind])
    return found


def test_accumulation_sends_what_the_stage_says() -> None:
    padded = 4 * 2 * sum(aligned(3 * p[0].numel()) for p in Net().parameters())  # 5 rows: 3 on each of two ranks
    for stage, by_rank in zip((1, 2, 3), run_cases_on_ranks(sent, 2, [(1,), (2,), (3,)]), strict=True):
        reduced, gathered = by_rank[0]["reduce_scatter"], by_rank[0]["all_gather"]
        assert [number > 0 for number in reduced] == [stage > 1, stage > 1, True, False]
        assert [number > 0 for number in gathered] == [stage == 3] * 3 + [True]
        assert max(reduced) <= padded


class Skipping(Net):
    """Uses some of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.extend(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: torch.Tensor, blocks: int) -> torch.Tensor:
        for block in self.blocks[:blocks]:  # type: ignore[index]
            x = torch.tanh(block(x))
        return x


def one_rank_uses_all(rank: int, world_size: int, stage: int) -> dict[str, torch.Tensor]:
    model = fm.shard_data_parallel(Skipping(), fm.init_mesh(), stage, bucket_mb=1e-4)
    optimizer = fm.ShardedOptimizer(model, torch.optim.SGD, lr=0.1, weight_decay=0.1)
    for step in range(2):
        model(samples(step, rank), 1 if rank == step == 1 else 5).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return fm.full_state_dict(model)


def test_a_parameter_that_one_rank_uses_is_updated_on_all() -> None:
    model = Skipping()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(2):
        loss = model(samples(step, 0), 5).square().mean() + model(samples(step, 1), 5 - 4 * step).square().mean()
        (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for by_rank in run_cases_on_ranks(one_rank_uses_all, 2, [(1,), (2,)]):
        for weights in by_rank:
            for name, value in model.state_dict().items():
                torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-7)


class Reader(nn.Module):
    """Reads the weight of a module whose forward it never calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(x, self.blocks[2].weight)
        return self.blocks[1](self.blocks[0](x)) + self.blocks[2].bias


class EarlyReader(Reader):
    """Reads the weight of a module before its forward."""

    def __init__(self) -> None:
        super().__init__()
        del self.blocks[2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x) * self.blocks[1].weight.sum())


def read_elsewhere(rank: int, world_size: int, stage: int) -> list[Any]:
    """Return the losses of both models in the second step."""
    mesh, found = fm.init_mesh(), []
    for kind in (Reader, EarlyReader):
        model = fm.shard_data_parallel(kind(), mesh, stage, bucket_mb=1e-4)
        optimizer = fm.ShardedOptimizer(model, torch.optim.SGD, lr=0.1)
        for _ in range(2):
            loss = model(samples(0, 0)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.step()  # what arrives later must not undo it
            optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def test_a_weight_that_is_read_without_its_module_is_right_or_nan() -> None:
    model = Reader()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = model(samples(0, 0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
    for stage, by_rank in zip((1, 2, 3), run_cases_on_ranks(read_elsewhere, 2, [(1,), (2,), (3,)]), strict=True):
        for right, early in by_rank:
            assert early != early
            assert right == pytest.approx(float(loss.detach()), rel=1e-6) if stage < 3 else right != right


def float16_steps(rank: int, world_size: int) -> list[float]:
    """One rank's rows overflow in the first step: all ranks skip it."""
    mesh = fm.init_mesh()
    model = fm.shard_data_parallel(Net(), mesh, 1)
    optimizer = fm.ShardedOptimizer(model, torch.optim.SGD, lr=0.1)
    scaler = fm.GradScaler(mesh, "cpu", init_scale=1024.0)
    for step in range(2):
        loss = model(samples(step, 0)).square().mean()
        if step == 0:
            loss = loss + model.blocks[0].weight[4].sum() * torch.inf  # type: ignore[union-attr,index]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        fm.clip_grad_norm_(model, 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    weights = fm.full_state_dict(model)
    return [scaler.get_scale(), float(weights["blocks.0.weight"].sum())]


def test_all_ranks_skip_a_step_whose_gradients_overflow() -> None:
    first, second = run_on_ranks(float16_steps, 2)
    model = Net()
    backward(model, samples(1, 0))
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    wanted = model.blocks[0].weight - 0.1 * model.blocks[0].weight.grad  # type: ignore[operator]
    assert first == second == [512.0, pytest.approx(float(wanted.detach().sum()), rel=1e-5)]
