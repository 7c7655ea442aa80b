"""Stochastic rounding to bfloat16 in plain PyTorch."""

import torch

_LOW_BITS = 0xFFFF


def round_to_bfloat16(values: torch.Tensor, random_bits: torch.Tensor) -> torch.Tensor:
    """Round float32 to bfloat16, up or down with probabilities that make the mean exact.

    A value between two neighbours of bfloat16 becomes the one of larger magnitude with a probability of its distance
    from the other, in units of their distance, to 2^-16. Values that bfloat16 has, infinities and NaNs stay.

    Args:
        values: float32.
        random_bits: int64, independent and uniform in [0, 2^16), in the shape of values.
    """
    # The low 16 bits are the fraction that bfloat16 drops; a carry goes to its last digit, and on to the exponent.
    bits = values.contiguous().view(torch.int32)
    rounded = ((bits + random_bits.to(torch.int32)) & ~_LOW_BITS).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).bfloat16()
