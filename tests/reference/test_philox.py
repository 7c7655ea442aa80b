"""Start here when dropout draws other random numbers than its docstring states."""

import pytest
import torch

from fused_megatron.reference import philox

ONES = 0xFFFFFFFF


# Random123's known answers (kat_vectors, philox4x32-7): counter, key, result.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((ONES,) * 4, (ONES,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    words = philox.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_rows_are_those_of_single_indices(length):
    rng_state, starts = torch.tensor([11, 3]), torch.tensor([0, 1, 2, 3, 6, 4 * 2**40 + 3])
    wanted = philox.random_words(rng_state, starts[:, None] + torch.arange(length))
    assert torch.equal(philox.rows_of_random_words(rng_state, starts, length), wanted)


def test_random_words_are_lanes_of_blocks_of_four():
    seed, offset = 0x299F31D0A4093822, 0x0370734413198A2E
    block = 0x85A308D3243F6A88  # the counter of the known answer; its top bits would not fit in an index
    rng_state = torch.tensor([seed, offset])
    index = torch.arange(4) + 4 * (block % 2**60)
    counter = [block % 2**60 % 2**32, block % 2**60 >> 32, offset % 2**32, offset >> 32]
    key = [seed % 2**32, seed >> 32]
    expected = philox.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert philox.random_words(rng_state, index).tolist() == [int(w) for w in expected]
    # Negative seeds and offsets are used as 64 unsigned bits.
    zero = torch.zeros(4, dtype=torch.int64)
    all_ones = torch.tensor(ONES)
    expected = philox.philox4x32((zero[0], zero[0], all_ones, all_ones), (all_ones, all_ones))
    assert philox.random_words(torch.tensor([-1, -1]), torch.arange(4)).tolist() == [int(w) for w in expected]


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.999])
def test_elements_are_kept_with_the_right_probability(p):
    n = 200_000
    keep = philox.keep_mask(torch.tensor([1, 2]), torch.arange(n), p)
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs((~keep).double().mean().item() - p) <= 4 * sigma


def test_the_threshold_is_exact():
    # Elements 0 and 1 have the halves of this word for seed 0 and offset 0: each is kept for p = half / 2^16, dropped
    # for the next p.
    low, high = 0xB709, 0x5F6F
    rng_state = torch.zeros(2, dtype=torch.int64)
    for index, half in ((0, low), (1, high)):
        element = torch.tensor([index])
        assert philox.keep_mask(rng_state, element, half / 2**16).item()
        assert philox.keep_mask(rng_state, element, (half + 0.49) / 2**16).item()
        assert not philox.keep_mask(rng_state, element, (half + 1) / 2**16).item()
    assert not philox.keep_mask(torch.tensor([5, 6]), torch.arange(1_000), 1.0 - 2**-53).any()


def test_halves_are_in_the_order_of_the_words():
    rng_state, index = torch.tensor([5, 6]), torch.arange(80) + 16 * 2**33
    words = philox.random_words(rng_state, torch.arange(40) + 8 * 2**33)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten()
    for p in (0.1, 0.5, 0.9):
        assert torch.equal(philox.keep_mask(rng_state, index, p), halves >= round(p * 2**16))


@pytest.mark.parametrize(("p", "used"), [(0.1, 6554), (0.5, 2**15), (2**-18, 0), (1.0 - 2**-20, 2**16 - 1)])
def test_the_scale_belongs_to_the_rounded_probability(p, used):
    assert philox.drop_threshold(p) == used
    assert philox.keep_scale(p) == 1.0 / (1.0 - used / 2**16)
    assert philox.keep_scale(1.0) == 0.0
