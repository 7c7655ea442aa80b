"""Start here when a call that cannot be right after shard_data_parallel is no error, or the error is no clear line."""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.testing.run_on_ranks import run_on_ranks


class ByNorm(torch.optim.SGD):
    """An optimizer that divides each gradient by its norm, as LARS does."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.div_(p.grad.norm())
        super().step()


class SignOfMomentum(torch.optim.Optimizer):
    """An elementwise optimizer that torch does not have."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.9).add_(p.grad)
                p.add_(momentum.sign(), alpha=-group["lr"])


def made(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5, **options), nn.Tanh(), nn.Linear(5, 3, **options))


class Twice(nn.Module):
    """One layer in two checkpoints, which run backward inside backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=True)
        return x


def wrong_arguments(rank: int, mesh: fm.Mesh) -> dict[str, Callable[[], Any]]:
    """Calls of shard_data_parallel by a part of their message."""
    share = fm.shard_data_parallel
    return {
        r"zero_stage=0 must be 1, 2 or 3 \(0 shares nothing": lambda: share(made(), mesh, 0),
        r"zero_stage=4 must be 1, 2 or 3": lambda: share(made(), mesh, 4),
        r"zero_stage='x' must be 1, 2 or 3": lambda: share(made(), mesh, "x"),  # type: ignore[arg-type]
        r"zero_stage=True must be 1, 2 or 3": lambda: share(made(), mesh, True),
        r"data_parallel_size=2 must be divisible by shard_size=3": lambda: share(made(), mesh, 1, shard_size=3),
        r"shard_size=1 must be 2 or more": lambda: share(made(), mesh, 1, shard_size=1),
        r"bucket_mb=0 must be above 0": lambda: share(made(), mesh, 1, bucket_mb=0),
        r"0.weight.dtype=float64 must be one of: float32": lambda: share(made(dtype=torch.float64), mesh, 1),
        r"Sequential has no parameter to train": lambda: share(made().requires_grad_(False), mesh, 1),
        r"has a DistributedDataParallel already": lambda: share(DistributedDataParallel(made()), mesh, 1),
        r"has a DTensor already": lambda: share(fully_shard(made(), mesh=mesh.device_mesh["dp"]), mesh, 1),
        r"ranks \[1\] have another model, or other arguments, than rank 0": lambda: share(
            nn.Linear(3, 3 + rank), mesh, 1
        ),
        r"ranks \[1\] have another model, or other arguments, than": lambda: share(made(), mesh, 1 + rank),
        r"0.weight on rank 1 differs from rank 0, .*\(load the same weights on all": lambda: share(
            made(seed=rank), mesh, 1
        ),
        r"rank 1: the model is on the meta device": lambda: share(made(device=("cpu", "meta")[rank]), mesh, 1),
    }


def wrong_calls(model: Any, mesh: fm.Mesh) -> dict[str, Callable[[], Any]]:
    """Calls on a model after shard_data_parallel in stage 3, by a part of their message."""
    sgd, optimizer = torch.optim.SGD, fm.ShardedOptimizer
    state = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    old = optimizer(model, sgd, lr=0.1)
    current = optimizer(model, sgd, lr=0.1)
    outside = sgd(list(model.parameters()), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    return {
        r"0.weight is in buckets of data-parallel ranks already": lambda: fm.shard_data_parallel(model, mesh, 3),
        r"DistributedDataParallel cannot work on a model after": lambda: DistributedDataParallel(model),
        r"^fully_shard cannot work on a model after": lambda: fully_shard(model, mesh=mesh.device_mesh["dp"]),
        r"FullyShardedDataParallel cannot work": lambda: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        r"a torch optimizer of model.parameters\(\) cannot": lambda: sgd(model.parameters(), lr=0.1),
        r"a torch optimizer of model.parameters\(\) cannot work": lambda: sgd(model.named_parameters(), lr=0.1),
        r"SGD has parameters of a model after shard_data_parallel \(fm.ShardedOptimizer": outside.step,
        r"clip_grad_norm_ cannot work .*fm.clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        r"the model cannot become torch.bfloat16": model.bfloat16,
        r"the model cannot become torch.float32 on meta": lambda: model.to("meta"),
        r"state_dict with zero_stage=3: .*full_state_dict": model.state_dict,
        r"zero_stage=3: .*load_full_state_dict": lambda: model.load_state_dict(state),
        r"assign=True\) would replace": lambda: model.load_state_dict(state, assign=True),
        r"cannot be copied or pickled": lambda: copy.deepcopy(model),
        r"cannot be copied or pickled \(": lambda: torch.save(model, io.BytesIO()),
        r"has shared rows already \(parallelize before": lambda: fm.parallelize(model, mesh),
        r"optimizer=Muon needs whole parameters": lambda: optimizer(model, torch.optim.Muon),
        r"optimizer=Adafactor needs whole": lambda: optimizer(model, torch.optim.Adafactor),
        r"optimizer=LBFGS needs whole": lambda: optimizer(model, torch.optim.LBFGS),
        r"optimizer=SparseAdam needs whole": lambda: optimizer(model, torch.optim.SparseAdam),
        r"optimizer=ByNorm makes other updates of two halves": lambda: optimizer(model, ByNorm, lr=0.1),
        r"optimizer=SignOfMomentum failed in a trial \(TypeError": lambda: optimizer(model, SignOfMomentum),
        r"optimizer=str must be a class of optimizers": lambda: optimizer(model, "adamw"),  # type: ignore[arg-type]
        r"needs a model after fm.shard_data_parallel": lambda: optimizer(made(), sgd),
        r"groups: 'head' is no parameter of the model": lambda: optimizer(model, sgd, ["head"]),
        r"groups: a tensor of shape \(2,\) is no parameter": lambda: optimizer(model, sgd, [torch.zeros(2)]),
        r"pass all groups when": lambda: current.add_param_group({"params": []}),
        r"after another one was made": old.step,
        r"fm.GradScaler\(mesh\) looks in all": lambda: scaled(scaler, model, current),
    }


def scaled(scaler: torch.amp.GradScaler, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler.scale(model(torch.ones(2, 4)).sum()).backward()
    scaler.step(optimizer)


def refusals(rank: int, world_size: int) -> list[str]:
    """Check every message; return those that are more than one line."""
    warnings.simplefilter("ignore")
    mesh = fm.init_mesh()
    model = fm.shard_data_parallel(made(), mesh, 3)
    calls = {**wrong_arguments(rank, mesh), **wrong_calls(model, mesh)}
    lines = []
    for message, call in calls.items():
        with pytest.raises(InputError, match=message) as raised:
            call()
        lines.append(str(raised.value))
    for arguments in ((nn.Linear, mesh), (made(), mesh.device_mesh)):
        with pytest.raises(TypeError, match=r"must be"):
            fm.shard_data_parallel(*arguments, 1)
    assert model.to("cpu").float() is model
    fm.ShardedOptimizer(model, SignOfMomentum, lr=0.1)
    twice = fm.shard_data_parallel(Twice(), mesh, 2)
    loss = twice(torch.ones(1, 4, requires_grad=True)).sum()
    with pytest.raises(InputError, match=r"layer.(weight|bias) got two gradients in one backward.*use_reentrant=False"):
        loss.backward()
    frozen = made()
    frozen[0].requires_grad_(False)
    optimizer = fm.ShardedOptimizer(fm.shard_data_parallel(frozen, mesh, 1), torch.optim.SGD)
    frozen[0].requires_grad_(True)
    with pytest.raises(InputError, match=r"0.weight was frozen when shard_data_parallel was called"):
        optimizer.step()
    dist.barrier()
    return [line for line in lines if "\n" in line]


def test_what_cannot_be_right_is_one_clear_line() -> None:
    assert run_on_ranks(refusals, 2) == [[], []]


def sent_to_an_indexed_cpu(rank: int, world_size: int) -> float:
    """torch takes cpu:0 for another device than cpu, and copies. Accelerate names its device so."""
    torch.manual_seed(0)
    model = fm.shard_data_parallel(nn.Linear(4, 3), fm.init_mesh(), zero_stage=1)
    model.to(f"cpu:{rank}")
    model(torch.ones(2, 4)).sum().backward()
    return float(fm.clip_grad_norm_(model, 10.0))


def test_a_move_to_the_same_device_keeps_the_buckets() -> None:
    assert run_on_ranks(sent_to_an_indexed_cpu, 2) == pytest.approx([(3 * 4 * 4 + 3 * 4) ** 0.5] * 2)
