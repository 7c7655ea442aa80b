"""Start here when stochastic rounding has a bias, or changes a value that needs no rounding."""

import torch

from fused_megatron.reference.stochastic_rounding import round_to_bfloat16


def test_the_mean_over_all_random_bits_is_the_value() -> None:
    bits = torch.arange(1 << 16)
    for value in (1.001, -3.14159, 1e-30, 255.9, 2.0**-126 * 1.3):
        rounded = round_to_bfloat16(torch.full(bits.shape, value), bits).double()
        assert rounded.unique().numel() == 2
        assert abs(rounded.mean().item() - torch.tensor(value).item()) < 2**-22 * abs(value)


def test_values_without_a_fraction_stay() -> None:
    kept = torch.tensor([0.0, -0.0, 1.5, -(2.0**120), torch.inf, -torch.inf, torch.nan])
    for bits in (0, 0xFFFF):
        rounded = round_to_bfloat16(kept, torch.full(kept.shape, bits))
        torch.testing.assert_close(rounded.float(), kept, rtol=0, atol=0, equal_nan=True)
    # NaNs of all bits, to which nothing can be added.
    strange = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert round_to_bfloat16(strange, torch.full((2,), 0xFFFF)).isnan().all()
