"""The counter-based random numbers of dropout, in plain PyTorch: the definition of the scheme.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011). rng_state is
(seed, offset), two int64. The element with global index g has

    word(g) = philox4x32_10(counter=(g // 4, offset), key=seed)[g % 4]

where the 128-bit counter is (low 32 bits of g // 4, high 32 bits of g // 4, low of offset, high of offset) and the key
is (low of seed, high of seed). With threshold = floor(p * 2^32) an element is kept if word(g) >= threshold, so that it
is dropped with probability p, to 2^-32. csrc/philox.h says the same in C++, bit for bit. (Initial weights, see
sharding/initialization.py, come from NumPy's generator, which is the 64-bit member of the family.)
"""

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Ten rounds over 32-bit words, held in int64 tensors of any one shape: four words of counter, two of key."""
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(rng_state: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The random word, in [0, 2^32), of every global index; int64 in and out."""
    (seed, offset), block, lane = rng_state.unbind(), index >> 2, index & 3
    w0, w1, w2, w3 = philox4x32((*_halves(block), *_halves(offset)), _halves(seed))
    return torch.where(lane < 2, torch.where(lane == 0, w0, w1), torch.where(lane == 2, w2, w3))


def keep_mask(rng_state: torch.Tensor, index: torch.Tensor, p: float) -> torch.Tensor:
    """Which of the elements with these global indices dropout keeps, if it drops with probability p < 1; bool."""
    return random_words(rng_state, index) >= int(p * 2**32)


def _halves(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return value & _MASK, (value >> 32) & _MASK


def _product(a: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and the low 32 bits of a * multiplier, by halves of a, so that nothing exceeds 63 bits."""
    high, low = (a >> 16) * multiplier, (a & 0xFFFF) * multiplier
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & _MASK
