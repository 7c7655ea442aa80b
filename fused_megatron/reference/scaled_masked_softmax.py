"""Softmax of scaled attention scores under a mask, in plain PyTorch, forward and backward."""

import torch

from fused_megatron.reference.precision import widen


def scaled_masked_softmax_forward(
    x: torch.Tensor, mask: torch.Tensor | None, scale: float, causal: bool, window: int
) -> torch.Tensor:
    """Compute torch.ops.fused_megatron.scaled_masked_softmax_forward; plain autograd works."""
    if x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    hidden = _hidden(x, mask, causal, window)
    scores = widen(x) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    maximum = scores.detach().amax(dim=-1, keepdim=True)
    # A row of only -inf sees no key: it is shifted by 0 and divided by 1, so that it becomes 0 and not NaN.
    exponentials = (scores - maximum.masked_fill(maximum == -torch.inf, 0.0)).exp()
    total = exponentials.sum(dim=-1, keepdim=True)
    y = exponentials / total.masked_fill(total == 0.0, 1.0)
    if hidden is not None:
        y = y.masked_fill(hidden, 0.0)  # also in a row that contains a NaN
    return y.to(x.dtype).contiguous()


def scaled_masked_softmax_backward(
    dy: torch.Tensor, y: torch.Tensor, scale: float, causal: bool, window: int
) -> torch.Tensor:
    """Compute torch.ops.fused_megatron.scaled_masked_softmax_backward: the gradient of x, in the dtype of y."""
    if y.numel() == 0:
        return y.clone(memory_format=torch.contiguous_format)
    hidden = _hidden(y, None, causal, window)
    dy = widen(dy)
    y_wide = widen(y)
    if hidden is not None:
        dy = dy.masked_fill(hidden, 0.0)
    dx = scale * (y_wide * (dy - (dy * y_wide).sum(dim=-1, keepdim=True)))
    if hidden is not None:
        dx = dx.masked_fill(hidden, 0.0)
    return dx.to(y.dtype).contiguous()


def _hidden(x: torch.Tensor, mask: torch.Tensor | None, causal: bool, window: int) -> torch.Tensor | None:
    """Return True where a query may not see a key: masked, after the query, or before the window."""
    if not causal:
        return mask
    num_keys = x.shape[-1]
    num_queries = x.shape[-2] if x.dim() > 1 else 1
    # The last key that each query sees. The last query sees the last key.
    last = torch.arange(num_queries, device=x.device).unsqueeze(1) + (num_keys - num_queries)
    key = torch.arange(num_keys, device=x.device)
    hidden = key > last
    if window:
        hidden = hidden | (key <= last - window)
    if x.dim() == 1:
        hidden = hidden.squeeze(0)
    return hidden if mask is None else hidden | mask
