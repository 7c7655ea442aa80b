"""Exchange of tokens between the ranks of a mixture-of-experts layer, and the products of their experts."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fused_megatron import ops
from fused_megatron.collectives import Group, group_rank, group_size
from fused_megatron.ops.autograd_function import AutogradFunction


class _Exchange(AutogradFunction):
    op = "expert_parallel.ExpertMLP"

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
        ctx.rest = sent, received, group
        return _exchange(x, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        sent, received, group = ctx.rest
        return _exchange(dy, received, sent, group), None, None, None


def _exchange(x: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
    result = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), received, sent, group=group)
    return result


def run_experts(
    layer: Any, x: torch.Tensor, experts: torch.Tensor, probabilities: torch.Tensor, keep: torch.Tensor | None
) -> torch.Tensor:
    """Send the tokens to the experts of a layer and return the weighted sums of their results."""
    ep_group, etp_group = layer.ep_group, layer.etp_group
    ep, etp = group_size(ep_group), group_size(etp_group)
    num_selected, num_experts = experts.shape[1], layer.num_experts
    flat = experts.flatten() if keep is None else experts.masked_fill(~keep, num_experts).flatten()
    pairs = flat.argsort(stable=True)[: int((flat < num_experts).sum())]
    counts = torch.bincount(flat[pairs], minlength=num_experts)
    rows, weights = x[pairs // num_selected], probabilities.flatten()[pairs]
    own = counts.view(ep, -1)
    if ep > 1:
        sent = own.sum(1).tolist()
        own = _exchange(own, [1] * ep, [1] * ep, ep_group)
        received = own.sum(1).tolist()
        rows = _Exchange.apply(rows, sent, received, ep_group)
        weights = _Exchange.apply(weights, sent, received, ep_group)
    if etp > 1:
        sizes = _exchange(own.sum().expand(etp), [1] * etp, [1] * etp, etp_group).tolist()
        own = _exchange(own.repeat(etp, 1), [ep] * etp, [ep] * etp, etp_group)
        here = [rows.shape[0]] * etp
        rows = _Exchange.apply(rows.repeat(etp, 1), here, sizes, etp_group)
        weights = _Exchange.apply(weights.repeat(etp), here, sizes, etp_group)
    numbers = torch.arange(own.shape[1]).repeat(own.shape[0]).repeat_interleave(own.flatten())
    order = numbers.argsort(stable=True)
    y = _products(layer, rows[order], weights[order], own.sum(0).tolist())
    y = torch.zeros_like(rows).index_copy(0, order, y)
    if etp > 1:
        y = _Exchange.apply(y, sizes, here, etp_group).unflatten(0, (etp, here[0])).sum(0)
    if ep > 1:
        y = _Exchange.apply(y, received, sent, ep_group)
    return torch.zeros_like(x).index_add(0, pairs // num_selected, y)


def _products(layer: Any, x: torch.Tensor, weights: torch.Tensor, counts: list[int]) -> torch.Tensor:
    activations = {
        "gelu": ops.bias_gelu,
        "gelu_exact": lambda h: ops.bias_gelu(h, approximate="none"),
        "geglu": ops.bias_geglu,
        "swiglu": ops.bias_swiglu,
    }
    parts = len(counts)
    expansion, projection = layer.expansion_weight.chunk(parts), layer.projection_weight.chunk(parts)
    biases: Any = [None] * parts, [None] * parts
    if layer.expansion_bias is not None:
        # Each of the etp ranks has a part of the sum: one of them adds the bias, and all get its gradient.
        ranks = 1 if group_rank(layer.etp_group) == 0 else 0
        biases = layer.expansion_bias.chunk(parts), (layer.projection_bias * ranks).chunk(parts)
    results = []
    for i, rows in enumerate(x.split(counts)):
        a = activations[layer.activation](F.linear(rows, expansion[i], biases[0][i]))
        results.append(F.linear(a, projection[i], biases[1][i]))
    return (torch.cat(results) * weights[:, None]).to(x.dtype)
