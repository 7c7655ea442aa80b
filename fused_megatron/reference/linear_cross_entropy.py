"""Cross-entropy of a linear head in plain PyTorch, with all logits in memory, in fp32 (fp64 for fp64)."""

import torch

from fused_megatron.reference.cross_entropy import LossTerms, cross_entropy


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor, terms: LossTerms
) -> torch.Tensor:
    """Return the loss of each token [T] for hidden [T, H] and weight [V, H]; plain autograd works."""
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    logits = hidden.to(wide) @ weight[: terms.vocab_size].to(wide).t()
    if bias is not None:
        logits = logits + bias[: terms.vocab_size].to(wide)
    return cross_entropy(logits, target, terms)
