"""Order of tokens by expert in plain PyTorch: the sort, the gather of rows, the weighted sum back to tokens."""

import torch

from fused_megatron.reference.precision import widen


def expert_order(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute torch.ops.fused_megatron.expert_order: (rows, places, counts) of ops.ExpertOrder."""
    ids = experts.reshape(-1)
    keys = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    ordered, rows = keys.sort(stable=True)
    places = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows), device=rows.device))
    bounds = torch.searchsorted(ordered, torch.arange(num_experts + 1, device=rows.device))
    return rows, places.view(experts.shape), bounds.diff()


def expert_permute(x: torch.Tensor, places: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Compute torch.ops.fused_megatron.expert_permute: the row of each token at the places of its pairs.

    Places beyond the last of num_rows rows are left out.
    """
    used = (places < num_rows).reshape(-1)
    tokens = torch.arange(places.numel(), device=x.device)[used] // places.shape[1]
    return x.new_zeros((num_rows, x.shape[1])).index_copy(0, places.reshape(-1)[used], x.index_select(0, tokens))


def expert_combine(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Compute torch.ops.fused_megatron.expert_combine: the (weighted) sum of the rows of each token.

    Places beyond the last row of y count as rows of 0. Summed in fp32 (fp64 for fp64) in the order of k, rounded once.
    """
    rows = _rows_of_pairs(y, places)
    total = widen(y).new_zeros((len(places), y.shape[1]))
    for k in range(places.shape[1]):
        row = widen(rows[:, k])
        total = total + (row if weights is None else _weights_of_pairs(weights, places, len(y))[:, k, None] * row)
    return total.to(y.dtype)


def expert_combine_backward(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    places: torch.Tensor,
    weights: torch.Tensor,
    num_rows: int,
    need_y: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute torch.ops.fused_megatron.expert_combine_backward: (grad_y, grad_weights); without y no grad_weights."""
    grad_y, grad_weights = grad.new_empty(0), weights.new_empty(0)
    if need_y:
        used = places < num_rows
        products = (weights.unsqueeze(2) * widen(grad).unsqueeze(1)).to(grad.dtype)
        grad_y = grad.new_zeros((num_rows, grad.shape[1]))
        grad_y[places[used]] = products[used]
    if y is not None:
        grad_weights = (widen(_rows_of_pairs(y, places)) * widen(grad).unsqueeze(1)).sum(dim=2).to(weights.dtype)
    return grad_y, grad_weights


def _rows_of_pairs(y: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the row of each pair [T, K, H]; 0 for places beyond the last row."""
    with_zeros = torch.cat([y, y.new_zeros((1, y.shape[1]))])
    return with_zeros.index_select(0, places.reshape(-1).clamp(max=len(y))).view(*places.shape, y.shape[1])


def _weights_of_pairs(weights: torch.Tensor, places: torch.Tensor, num_rows: int) -> torch.Tensor:
    return weights.masked_fill(places >= num_rows, 0.0)
