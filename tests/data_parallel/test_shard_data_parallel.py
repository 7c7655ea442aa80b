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


def plain() -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return weights and norms of a plain loop in one process on all samples."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    norms = []
    for step in range(STEPS):
        loss_of(model, batch(step), step == 1).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model.state_dict(), norms


def sharded(
    rank: int,
    world_size: int,
    stage: int,
    accumulate: int,
    announced: bool,
    shard_size: int | None,
    recompute: bool | None,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return weights and norms of a user's loop, in which each replica has its part of the samples."""
    mesh = fm.init_mesh()
    model: Any = Model(recompute=recompute)
    assert fm.shard_data_parallel(model, mesh, stage, shard_size=shard_size, bucket_mb=1e-4) is model
    optimizer = fm.ShardedOptimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    norms = []
    for step in range(STEPS):
        parts = batch(step).chunk(mesh.dp_size)[mesh.dp_rank].chunk(accumulate)
        for i, ids in enumerate(parts):
            with model.no_sync() if announced and i + 1 < accumulate else contextlib.nullcontext():
                (loss_of(model, ids, step == 1) / accumulate).backward()
        norms.append(float(fm.clip_grad_norm_(model, CLIP)))
        optimizer.step()
        scheduler.step()
        model.zero_grad()
    return fm.full_state_dict(model), norms


# Stage, microbatches, whether all but the last are inside no_sync, shard_size, use_reentrant of the checkpoints.
Case = tuple[int, int, bool, int | None, bool | None]
CASES: dict[int, list[Case]] = {
    1: [(1, 2, False, None, None), (3, 2, True, None, None)],
    2: [
        (1, 1, True, None, True),
        (1, 2, True, None, None),
        (2, 2, True, None, False),
        (2, 2, False, None, None),
        (3, 1, True, None, True),
        (3, 2, True, None, False),
    ],
    3: [(1, 2, True, None, None), (2, 1, True, None, None), (3, 2, False, None, None)],
    4: [(1, 2, False, 2, None), (3, 2, True, 2, None)],
}
SLOW_CASES: dict[int, list[Case]] = {
    ranks: [
        (stage, accumulate, announced, shard_size, recompute)
        for stage in (1, 2, 3)
        for accumulate in (1, 2)
        for announced in (True, False)
        for recompute in (None, True, False)
    ]
    for ranks, shard_size in ((1, None), (2, None), (3, None), (4, 2))
}


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [*CASES.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW_CASES.items())],
    ids=str,
)
def test_the_loop_of_a_user_trains_as_a_plain_one(ranks: int, cases: list[Case]) -> None:
    wanted, wanted_norms = plain()
    for case, by_rank in zip(cases, run_cases_on_ranks(sharded, ranks, cases), strict=True):
        for weights, norms in by_rank:
            assert norms == pytest.approx(wanted_norms, rel=1e-5), case
            assert list(weights) == list(wanted), case
            for name, value in wanted.items():
                torch.testing.assert_close(weights[name], value, rtol=2e-6, atol=1e-7, msg=f"{name} of {case}")
