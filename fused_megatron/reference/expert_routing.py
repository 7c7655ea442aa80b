"""Routing of tokens to experts in plain PyTorch: scores, selection, probabilities, and the sums of balance losses."""

import torch

# Added to divisors, as DeepSeek-V3 does: scores so small that their sum underflows give probability 0, not NaN.
TINY = 1e-20


def expert_routing_forward(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    num_selected: int,
    sigmoid: bool,
    normalize: bool,
    scale: float,
    num_groups: int,
    groups_per_token: int,
    num_sequences: int,
) -> tuple[torch.Tensor, ...]:
    """Compute torch.ops.fused_megatron.expert_routing_forward: ops.route_tokens, for float64 with plain autograd.

    Returns:
        experts [T, K] int64, probabilities [T, K], counts [B, E] int64, score_sums [B, E], z [].
    """
    num_rows, num_experts = logits.shape
    scores = logits.sigmoid() if sigmoid else logits.softmax(dim=1)
    experts = _select(logits, scores, bias, num_selected, num_groups, groups_per_token)
    chosen = scores.gather(1, experts)
    probabilities = scale * (chosen / (chosen.sum(dim=1, keepdim=True) + TINY) if normalize else chosen)
    of_sequence = (num_rows // num_sequences, num_sequences, num_experts)
    is_chosen = (experts.unsqueeze(2) == torch.arange(num_experts, device=logits.device)).sum(dim=1)
    shares = scores / (scores.sum(dim=1, keepdim=True) + TINY) if sigmoid else scores
    z = logits.logsumexp(dim=1).square().sum()
    return (
        experts,
        probabilities,
        is_chosen.view(of_sequence).sum(dim=0),
        shares.view(of_sequence).sum(dim=0),
        z,
    )


def expert_routing_backward(
    grad_probabilities: torch.Tensor,
    grad_score_sums: torch.Tensor,
    grad_z: torch.Tensor,
    logits: torch.Tensor,
    experts: torch.Tensor,
    sigmoid: bool,
    normalize: bool,
    scale: float,
) -> torch.Tensor:
    """Compute torch.ops.fused_megatron.expert_routing_backward: the gradient of the logits [T, E]."""
    softmax = logits.softmax(dim=1)
    scores = logits.sigmoid() if sigmoid else softmax
    grad_chosen = scale * grad_probabilities
    if normalize:
        chosen = scores.gather(1, experts)
        divisor = chosen.sum(dim=1, keepdim=True) + TINY
        grad_chosen = (grad_chosen - (grad_chosen * chosen / divisor).sum(dim=1, keepdim=True)) / divisor
    grad = grad_score_sums.unsqueeze(0).expand(len(logits) // len(grad_score_sums), -1, -1).reshape(logits.shape)
    if sigmoid:
        divisor = scores.sum(dim=1, keepdim=True) + TINY
        grad = (grad - (grad * scores / divisor).sum(dim=1, keepdim=True)) / divisor
    grad = grad.scatter_add(1, experts, grad_chosen)
    if sigmoid:
        grad = grad * scores * (1 - scores)
    else:
        grad = scores * (grad - (grad * scores).sum(dim=1, keepdim=True))
    return grad + 2 * grad_z * logits.logsumexp(dim=1, keepdim=True) * softmax


def _select(
    logits: torch.Tensor,
    scores: torch.Tensor,
    bias: torch.Tensor | None,
    num_selected: int,
    num_groups: int,
    groups_per_token: int,
) -> torch.Tensor:
    """Return the selected experts [T, K], best first; ties go to the lower index, and NaN counts as -inf."""
    scores = scores.detach()
    biased = _without_nan(scores if bias is None else scores + bias)
    # Scores rise with logits: without a bias logits are compared, which different rounding of scores cannot tie.
    value = _without_nan(logits.detach()) if bias is None else biased
    if groups_per_token == num_groups:
        return _best(value, num_selected)
    num_rows, num_experts = logits.shape
    size = num_experts // num_groups
    best_two = biased.view(num_rows, num_groups, size).topk(min(2, size), dim=2).values
    groups = _best(_without_nan(best_two.sum(dim=2)), groups_per_token).sort(dim=1).values
    members = (groups.unsqueeze(2) * size + torch.arange(size, device=logits.device)).flatten(1)
    return members.gather(1, _best(value.gather(1, members), num_selected))


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    return values.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _without_nan(values: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(values.isnan(), -torch.inf)
