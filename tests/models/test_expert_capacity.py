"""Start here when experts with a capacity drop other tokens than the last ones of a sequence."""

from typing import Any

import pytest
import torch

from fused_megatron.mesh import init_mesh
from fused_megatron.models.expert_capacity import kept_pairs, within_capacity
from fused_megatron.sharding import SequenceLayout, SequencePartition
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks

S, B, E, K = 11, 3, 5, 2
# Two ranks with different numbers of positions; the first one holds the start and the end.
PARTS = SequencePartition((SequenceLayout(S, ((0, 3), (8, 11))), SequenceLayout(S, ((3, 8),))))


def drawn(kind: str) -> torch.Tensor:
    """Return experts [S, B, K]; no token has an expert twice."""
    scores = torch.rand(S, B, E, generator=torch.Generator().manual_seed(4))
    scores[..., 2] += {"ragged": 0.4, "one expert": 2.0, "no favourite": 0.0}[kind]
    return scores.topk(K).indices


@pytest.mark.parametrize("slots", [0, 1, 3, S])
@pytest.mark.parametrize("kind", ["ragged", "one expert", "no favourite"])
def test_an_expert_takes_the_first_tokens_of_each_sequence(kind: str, slots: int) -> None:
    experts = drawn(kind)
    kept = within_capacity(experts, slots, E)
    taken: dict[tuple[int, int], int] = {}
    for s in range(S):
        for b in range(B):
            for k in range(K):
                key = b, int(experts[s, b, k])
                taken[key] = taken.get(key, 0) + 1
                assert bool(kept[s, b, k]) == (taken[key] <= slots)


def on_ranks(rank: int, world_size: int, sizes: dict[str, int]) -> tuple[list[int], torch.Tensor]:
    """Return the positions of this rank's tokens, and which of their pairs stay."""
    mesh = init_mesh(**sizes)
    partition = PARTS if mesh.cp_size > 1 else None
    rows = PARTS.layouts[mesh.cp_rank].positions() if partition else torch.arange(S)
    size = -(-len(rows) // mesh.tp_size)
    own = rows[mesh.tp_rank * size :][:size]
    kept = kept_pairs(
        drawn("ragged")[own],
        3,
        E,
        rows=len(rows),
        tp_group=mesh.tp_group,
        cp_group=mesh.cp_group,
        partition=partition,
    )
    return own.tolist(), kept


def test_ranks_that_share_sequences_drop_the_same_tokens() -> None:
    whole: Any = within_capacity(drawn("ragged"), 3, E)
    assert 0 < int((~whole).sum()) < whole.numel()
    cases = [
        ({"tensor_parallel_size": 4},),
        ({"tensor_parallel_size": 2, "context_parallel_size": 2},),
    ]
    for ranks in run_cases_on_ranks(on_ranks, 4, cases):
        assert sorted(position for own, _ in ranks for position in own) == list(range(S))
        for own, kept in ranks:
            assert torch.equal(kept, whole[own])
