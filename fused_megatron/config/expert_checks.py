"""Checks of the settings of experts, in the model and in its layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fused_megatron.checks import check, check_divisible, check_positive

if TYPE_CHECKING:
    from fused_megatron.config.model import TransformerConfig
    from fused_megatron.config.parallel import ParallelConfig

# Settings that have no effect without experts.
_OF_EXPERTS = (
    "experts_per_token",
    "expert_ffn_hidden_size",
    "num_shared_experts",
    "shared_expert_ffn_size",
    "shared_expert_gate",
    "moe_every",
    "num_dense_layers",
    "router_scores",
    "router_normalize",
    "router_scale",
    "router_groups",
    "router_groups_per_token",
    "router_bias_rate",
    "balance_loss",
    "balance_loss_over",
    "router_z_loss",
    "router_jitter",
    "capacity_factor",
)


def check_experts(model: TransformerConfig) -> None:
    """Raise InputError unless the settings of experts and routers fit each other."""
    if model.num_experts is None:
        for name in _OF_EXPERTS:
            value, default = getattr(model, name), type(model).__dataclass_fields__[name].default
            check(value == default, f"{name}={value} needs experts: set num_experts, or leave it out")
        return
    experts, selected = model.num_experts, model.experts_per_token
    check_positive("experts_per_token", selected)
    check(
        selected <= experts,
        f"experts_per_token={selected} must be at most num_experts={experts} (nearest: {experts})",
    )
    check(model.num_shared_experts >= 0, f"num_shared_experts={model.num_shared_experts} must be 0 or more")
    for name in ("shared_expert_ffn_size", "shared_expert_gate"):
        value = getattr(model, name)
        check(not value or model.num_shared_experts > 0, f"{name}={value} needs num_shared_experts=1 or more")
    check(
        bool(model.expert_blocks),
        f"num_dense_layers={model.num_dense_layers} and moe_every={model.moe_every} must leave one of the "
        f"num_layers={model.num_layers} blocks for experts (nearest: num_dense_layers=0, moe_every=1)",
    )
    check(model.num_dense_layers >= 0, f"num_dense_layers={model.num_dense_layers} must be 0 or more")
    _check_groups(model)
    check(model.router_scale > 0, f"router_scale={model.router_scale} must be above 0")
    for name in ("balance_loss", "router_z_loss", "router_bias_rate"):
        value = getattr(model, name)
        check(value is None or value >= 0, f"{name}={value} must be 0 or more")
    check(0 <= model.router_jitter < 1, f"router_jitter={model.router_jitter} must lie in [0, 1)")
    factor = model.capacity_factor
    check(factor is None or factor > 0, f"capacity_factor={factor} must be above 0 (None: no limit)")


def _check_groups(model: TransformerConfig) -> None:
    experts, groups, of_token = model.num_experts, model.router_groups, model.router_groups_per_token
    assert experts is not None
    check(
        (groups is None) == (of_token is None),
        f"router_groups={groups} and router_groups_per_token={of_token} must be given together",
    )
    if groups is None or of_token is None:
        return
    check(groups <= experts, f"router_groups={groups} must be at most num_experts={experts} (nearest: {experts})")
    check_divisible("num_experts", experts, "router_groups", groups)
    check(
        of_token <= groups,
        f"router_groups_per_token={of_token} must be at most router_groups={groups} (nearest: {groups})",
    )
    most = experts // groups * of_token
    check(
        model.experts_per_token <= most,
        f"experts_per_token={model.experts_per_token} must be at most {most}: a token selects from "
        f"router_groups_per_token={of_token} groups of {experts // groups} experts (nearest: {most})",
    )


def check_expert_parallel(model: TransformerConfig, parallel: ParallelConfig) -> None:
    """Raise InputError unless the experts can be divided over the ranks of the layout."""
    for name in ("expert_parallel_size", "expert_tensor_parallel_size"):
        value = getattr(parallel, name)
        check(
            model.num_experts is not None or value == 1,
            f"{name}={value} needs experts: set model.num_experts (nearest: {name}=1)",
        )
    if model.num_experts is None:
        check(
            parallel.expert_dispatch is None,
            f"expert_dispatch={parallel.expert_dispatch!r} needs experts: set model.num_experts, or leave it out",
        )
        return
    check_divisible("num_experts", model.num_experts, "expert_parallel_size", parallel.expert_parallel_size)
    check_divisible(
        "expert_ffn_hidden_size",
        model.expert_ffn_size,
        "expert_tensor_parallel_size",
        parallel.expert_tensor_parallel_size,
    )
    if model.shared_ffn_size:
        check_divisible(
            "shared_expert_ffn_size", model.shared_ffn_size, "tensor_parallel_size", parallel.tensor_parallel_size
        )
