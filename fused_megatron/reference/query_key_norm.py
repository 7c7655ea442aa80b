"""Root-mean-square normalisation of the heads of query and key, then their rotation, in plain PyTorch."""

import torch

from fused_megatron.reference.norm import norm_backward, normalise, sum_of_rows
from fused_megatron.reference.precision import widen
from fused_megatron.reference.rotary_embedding import rotate


def query_key_norm_out(
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: float,
) -> None:
    """Compute torch.ops.fused_megatron.query_key_norm_out: write the heads to memory of the same sizes."""
    for x, out, weight in ((q, q_out, q_weight), (k, k_out, k_weight)):
        normalised = normalise(x, weight, None, eps, False, centred=False)[0]
        out.copy_(_rotated(normalised, cos, sin, inverse=False))


def query_key_norm_backward_out(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    dq_out: torch.Tensor,
    dk_out: torch.Tensor,
    dv_out: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute torch.ops.fused_megatron.query_key_norm_backward_out; return the gradients of the weights."""
    found = []
    for dy, x, out, weight in ((dq, q, dq_out, q_weight), (dk, k, dk_out, k_weight)):
        rstd = (widen(x).square().mean(dim=-1) + eps).rsqrt()
        upstream = _rotated(widen(dy), cos, sin, inverse=True)
        gradient, rows = norm_backward(upstream, x, weight, None, rstd, None, False)
        out.copy_(gradient)
        found.append(sum_of_rows(rows, weight))
    dv_out.copy_(dv)
    return found[0], found[1]


def _rotated(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, *, inverse: bool) -> torch.Tensor:
    """Rotate x [S, B, heads, D] by the rows of the tables, or by their negative angles; without tables, return x."""
    if cos is None or sin is None:
        return x
    rows = [widen(table[: x.shape[0]]).unsqueeze(1) for table in (cos, sin)]
    return rotate(x, rows[0], -rows[1] if inverse else rows[1], False)
