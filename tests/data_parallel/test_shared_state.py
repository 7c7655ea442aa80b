"""Start here when experts in a user's own loop train differently, or their state does not fit another layout."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.expert_parallel import ExpertMLP
from fused_megatron.mesh import Mesh, init_mesh
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks

NUM_EXPERTS, BATCH = 4, 24
LAYOUTS: list[tuple[dict[str, int], int, int | None]] = [
    ({"expert_parallel_size": 4}, 1, None),
    ({"expert_parallel_size": 2, "expert_tensor_parallel_size": 2}, 2, 2),
    ({"expert_parallel_size": 2}, 3, None),
    ({}, 2, None),
]


class Model(nn.Module):
    """Two dense layers around experts. The first layer is used by no loss: its gradient is never there."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unused = nn.Linear(2, 2)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.experts = ExpertMLP(
            NUM_EXPERTS, 8, 6, activation="gelu", bias=True, ep_group=mesh["ep"].group, etp_group=mesh["etp"].group
        )
        self.experts.reset_parameters(seed=1, name="experts")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        probabilities, chosen = h[:, :NUM_EXPERTS].softmax(1).topk(2)
        return self.last(h + self.experts(h, chosen, probabilities))


def trained(
    rank: int,
    world_size: int,
    sizes: dict[str, int],
    zero_stage: int,
    shard_size: int | None,
    steps: range,
    saved: Any = None,
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, Any]]:
    """Train in a user's loop; return the norms, and the full states of the model and of the optimizer."""
    mesh = init_mesh(**sizes)
    model = fm.shard_data_parallel(Model(mesh), mesh, zero_stage, shard_size=shard_size, bucket_mb=1e-4)
    optimizer = fm.ShardedOptimizer(model, torch.optim.AdamW, lr=1e-2, eps=1e-4)
    if saved is not None:
        fm.load_full_state_dict(model, saved[0])
        optimizer.load_full_state_dict(copy.deepcopy(saved[1]))  # the cases share the tensors of scalars
    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(BATCH, 6, generator=generator), torch.randn(BATCH, 3, generator=generator)
        own = BATCH // world_size
        halves = torch.arange(rank * own, (rank + 1) * own).chunk(2)
        with model.no_sync():
            ((model(x[halves[0]]) - y[halves[0]]) ** 2).mean().div(2).backward()
        ((model(x[halves[1]]) - y[halves[1]]) ** 2).mean().div(2).backward()
        norms.append(float(fm.clip_grad_norm_(model, 0.05)))
        optimizer.step()
        optimizer.zero_grad()
    return norms, fm.full_state_dict(model), optimizer.full_state_dict()


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_same(found[key], value)
    elif isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    else:
        assert found == wanted


@pytest.mark.parametrize("layouts", [LAYOUTS[:2], pytest.param(LAYOUTS[2:], marks=pytest.mark.slow)])
def test_layouts_train_as_one_process_and_go_on_in_another_layout(
    layouts: list[tuple[dict[str, int], int, int | None]],
) -> None:
    one, halfway = (trained(0, 1, {}, 1, None, range(steps)) for steps in (3, 2))
    cases = [(*layout, range(2)) for layout in layouts]
    cases += [(*layout, range(2, 3), halfway[1:]) for layout in layouts]
    results = run_cases_on_ranks(trained, 4, cases)
    for number, ranks in enumerate(results):
        wanted, steps = (halfway, range(2)) if number < len(layouts) else (one, range(2, 3))
        for norms, weights, state in ranks:
            assert norms == pytest.approx([one[0][step] for step in steps], rel=1e-5)
            assert_same(weights, wanted[1])
            assert_same(state, wanted[2])


def refused(rank: int, world_size: int) -> list[str]:
    mesh = init_mesh(expert_parallel_size=2)
    texts = []
    with pytest.raises(InputError) as info:
        nn.parallel.DistributedDataParallel(Model(mesh))
    texts.append(str(info.value))
    model = Model(mesh)
    with torch.no_grad():
        model.experts.expansion_bias += rank // 2  # ranks 0 and 2 have the same experts
    with pytest.raises(InputError) as info:
        fm.shard_data_parallel(model, mesh, 1)
    texts.append(str(info.value))
    optimizer = fm.ShardedOptimizer(fm.shard_data_parallel(Model(mesh), mesh, 1), torch.optim.SGD, lr=0.1)
    with pytest.raises(InputError) as info:
        optimizer.load_state_dict({**optimizer.state_dict(), "rows": [rank, 4, 1 - rank // 2, 2, rank % 2, 2]})
    return [*texts, str(info.value)]


def test_wrappers_and_weights_that_do_not_fit_are_refused() -> None:
    (results,) = run_cases_on_ranks(refused, 4, [()])
    for rank, (wrapper, drift, rows) in enumerate(results):
        assert "would take the shards of expert-parallel ranks" in wrapper and "shard_data_parallel knows" in wrapper
        assert drift.startswith("experts.expansion_bias.0 on rank 2 differs from rank 0")
        own = rank // 2
        assert rows.startswith(
            f"the state has the rows {rank} of 4, of experts {1 - own} of 2, of expert-parallel ranks {rank % 2} of 2, "
            f"and this rank {rank} of 4, of experts {own} of 2, "
        )
