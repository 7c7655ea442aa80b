"""The precision in which the references compute."""

import torch


def widen(x: torch.Tensor) -> torch.Tensor:
    """x in the precision of the reference: float64 stays, everything narrower becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
