"""Start here when a user's own loop trains otherwise after shard_data_parallel than a plain loop on all samples."""

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_megatron as fm
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks

STEPS = 3
SAMPLES = 24
CLIP = 0.5


class Model(nn.Module):
    """Tied, frozen and unused parameters; a scalar; sizes that two and three ranks do not divide; checkpoints."""

    def __init__(self, dtype: torch.dtype = torch.float32, recompute: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(11, 5, dtype=dtype)
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 7, dtype=dtype), nn.Tanh(), nn.Linear(7, 5, dtype=dtype)) for _ in range(3)
        )
        self.frozen = nn.Linear(5, 5, dtype=dtype).requires_grad_(False)
        self.unused = nn.Linear(3, 3, dtype=dtype)
        self.some = nn.Linear(5, 5, dtype=dtype)  # used in some steps
        self.head = nn.Linear(5, 11, bias=False, dtype=dtype)
        self.head.weight = self.tokens.weight
        self.recompute = recompute

    def forward(self, ids: torch.Tensor, use_some: bool = False) -> dict[str, torch.Tensor]:
        x = self.tokens(ids) * self.scale
        for block in self.blocks:
            if self.recompute is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.recompute)
        x = x + self.frozen(x)
        return {"logits": self.head(self.some(x) if use_some else x)}


def batch(step: int) -> torch.Tensor:
    return torch.randint(11, (SAMPLES, 4), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, ids: torch.Tensor, use_some: bool) -> torch.Tensor:
    logits = model(ids, use_some=use_some)["logits"]
    return F.cross_entropy(logits.flatten(0, 1).float(), (3 * ids + 1).flatten() % 11)


def plain(accumulate: int, stages: int = STEPS) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return weights and norms of a plain loop in one process on all samples."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    norms = []
    for step in range(stages):
        loss_of(model, batch(step), step == 1).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model.state_dict(), norms


def train(
    model: nn.Module, optimizer: Any, mesh: Any, accumulate: int, announced: bool, steps: range = range(STEPS)
) -> list[float]:
    """Run the loop of a user; return the norms before clipping."""
    norms = []
    for step in steps:
        parts = batch(step).chunk(mesh.dp_size)[mesh.dp_rank].chunk(accumulate)
        for i, ids in enumerate(parts):
            with model.no_sync() if announced and i + 1 < accumulate else contextlib.nullcontext():  # type: ignore
                (loss_of(model, ids, step == 1) / accumulate).backward()
        norms.append(float(fm.clip_grad_norm_(model, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def sharded(
    rank: int, world_size: int, stage: int, accumulate: int, announced: bool, shard_size: int | None, recompute: Any
) -> tuple[dict[str, torch.Tensor], list[float]]:
    mesh = fm.init_mesh()
    model = Model(recompute=recompute)
    assert fm.shard_data_parallel(model, mesh, stage, shard_size=shard_size, bucket_mb=1e-4) is model
    optimizer = fm.ShardedOptimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    norms = []
    for step in range(STEPS):
        norms += train(model, optimizer, mesh, accumulate, announced, range(step, step + 1))
        scheduler.step()
    return fm.full_state_dict(model), norms


def cases(world_size: int) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = [
        (stage, accumulate, announced, None, None)
        for stage in (1, 2, 3)
        for accumulate, announced in ((1, True), (2, True), (2, False))
    ]
    found += [(1, 1, True, None, True), (3, 1, True, None, True), (2, 1, True, None, False), (3, 2, True, None, False)]
    if world_size == 4:
        found = [(stage, 2, announced, 2, None) for stage in (1, 2, 3) for announced in (True, False)]
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_loop_of_a_user_trains_as_a_plain_one(world_size: int) -> None:
    wanted, wanted_norms = plain(1)
    for case, by_rank in zip(
        cases(world_size), run_cases_on_ranks(sharded, world_size, cases(world_size)), strict=True
    ):
        for weights, norms in by_rank:
            assert norms == pytest.approx(wanted_norms, rel=1e-5), case
            assert list(weights) == list(wanted), case
            for name, value in wanted.items():
                torch.testing.assert_close(weights[name], value, rtol=2e-6, atol=1e-7, msg=f"{name} of {case}")
