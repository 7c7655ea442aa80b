"""Start here when settings of experts that do not fit each other are accepted, or refused with an unclear line."""

from typing import Any

import pytest

from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig

GROUPS = {"num_experts": 8, "router_groups": 4}
WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"num_experts": 6},
        {"expert_parallel_size": 4},
        "num_experts=6 must be divisible by expert_parallel_size=4 (nearest: 4, 8)",
    ),
    (
        {"num_experts": 4, "expert_ffn_hidden_size": 33},
        {"expert_tensor_parallel_size": 2},
        "expert_ffn_hidden_size=33 must be divisible by expert_tensor_parallel_size=2 (nearest: 32, 34)",
    ),
    (
        {"num_experts": 4, "ffn_hidden_size": 34},
        {"expert_tensor_parallel_size": 4},
        "expert_ffn_hidden_size=34 must be divisible by expert_tensor_parallel_size=4 (nearest: 32, 36)",
    ),
    (
        {"num_experts": 4, "num_shared_experts": 1, "shared_expert_ffn_size": 6},
        {"tensor_parallel_size": 4},
        "shared_expert_ffn_size=6 must be divisible by tensor_parallel_size=4 (nearest: 4, 8)",
    ),
    (
        {},
        {"expert_parallel_size": 2},
        "expert_parallel_size=2 needs experts: set model.num_experts (nearest: expert_parallel_size=1)",
    ),
    (
        {},
        {"expert_tensor_parallel_size": 2},
        "expert_tensor_parallel_size=2 needs experts: set model.num_experts (nearest: expert_tensor_parallel_size=1)",
    ),
    (
        {},
        {"expert_dispatch": "all_gather"},
        "expert_dispatch='all_gather' needs experts: set model.num_experts, or leave it out",
    ),
    ({"num_experts": 4, "experts_per_token": 5}, {}, "experts_per_token=5 must be at most num_experts=4 (nearest: 4)"),
    (
        {**GROUPS, "router_groups_per_token": 1, "experts_per_token": 3},
        {},
        "experts_per_token=3 must be at most 2: a token selects from router_groups_per_token=1 groups of 2 experts "
        "(nearest: 2)",
    ),
    (
        {**GROUPS, "router_groups_per_token": 5},
        {},
        "router_groups_per_token=5 must be at most router_groups=4 (nearest: 4)",
    ),
    (
        {"num_experts": 6, "router_groups": 4, "router_groups_per_token": 2},
        {},
        "num_experts=6 must be divisible by router_groups=4 (nearest: 4, 8)",
    ),
    (GROUPS, {}, "router_groups=4 and router_groups_per_token=None must be given together"),
    ({"balance_loss": 0.1}, {}, "balance_loss=0.1 needs experts: set num_experts, or leave it out"),
    ({"num_experts": 4, "shared_expert_gate": True}, {}, "shared_expert_gate=True needs num_shared_experts=1 or more"),
    (
        {"num_experts": 4, "num_dense_layers": 4},
        {},
        "num_dense_layers=4 and moe_every=1 must leave one of the num_layers=4 blocks for experts (nearest: "
        "num_dense_layers=0, moe_every=1)",
    ),
    ({"num_experts": 4, "capacity_factor": 0.0}, {}, "capacity_factor=0.0 must be above 0 (None: no limit)"),
    ({"num_experts": 4, "router_jitter": 1.0}, {}, "router_jitter=1.0 must lie in [0, 1)"),
    ({"num_experts": 4, "router_scores": "tanh"}, {}, "router_scores='tanh' must be one of: 'softmax', 'sigmoid'"),
]


@pytest.mark.parametrize(("model", "parallel", "message"), WRONG, ids=[message[:40] for *_, message in WRONG])
def test_one_line_names_the_nearest_good_value(model: dict[str, Any], parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        TrainConfig(GPTConfig(**model), ParallelConfig(**parallel))
    assert str(caught.value) == message


def test_which_blocks_have_experts() -> None:
    model = GPTConfig(num_layers=6, num_experts=4, moe_every=2, num_dense_layers=2, ffn_hidden_size=30)
    assert model.expert_blocks == (3, 5)
    # Only blocks without experts need an ffn_hidden_size that tensor parallelism divides.
    TrainConfig(
        GPTConfig(num_experts=4, ffn_hidden_size=30, expert_ffn_hidden_size=32), ParallelConfig(tensor_parallel_size=4)
    )
    with pytest.raises(InputError, match="ffn_hidden_size=30 must be divisible by tensor_parallel_size=4"):
        TrainConfig(model, ParallelConfig(tensor_parallel_size=4))


def test_widths_and_slots() -> None:
    model = GPTConfig(num_experts=8, ffn_hidden_size=64, num_shared_experts=3, capacity_factor=1.25)
    assert (model.expert_ffn_size, model.shared_ffn_size) == (64, 192)
    assert model.slots(100) == 32  # 1.25 * 2 * 100 / 8 = 31.25
    assert GPTConfig().slots(100) is None
