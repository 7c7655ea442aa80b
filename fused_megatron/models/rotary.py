"""The angles of rotary position embedding."""

import torch


def rotary_tables(
    seq_len: int, rotary_dim: int, base: float, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * base^(-2 i / rotary_dim), [seq_len, rotary_dim / 2] each, for ops.rotary_embedding.

    Made anew in every forward: once for all layers it costs nothing, and no buffer of the model can be cast or moved.
    Angles are float64: in float32 those of position 100,000 are off by 0.004.
    """
    pairs = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device)
    positions = torch.arange(seq_len, dtype=torch.float64, device=device)
    angles = torch.outer(positions, base ** (-pairs / rotary_dim))
    return angles.cos().to(dtype), angles.sin().to(dtype)
