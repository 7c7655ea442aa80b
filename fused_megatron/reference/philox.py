"""Counter-based random numbers for dropout (Philox) in plain PyTorch: the definition of the scheme.

Philox4x32-7 (Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011; seven rounds pass
their tests of randomness). rng_state is (seed, offset), two int64. A block of four 32-bit words is

    block(b) = philox4x32_7(counter=(b, offset), key=seed)

where the 128-bit counter is (low 32 bits of b, high 32 bits of b, low of offset, high of offset) and the key is (low of
seed, high of seed). In dropout the element with global index g has 16 bits of them: half g % 8 of block(g // 8), where
the low half of a word comes before its high half. It is kept if they are at least round(p * 2^16): p is rounded to a
multiple of 2^-16, and kept elements are multiplied by 1 / (1 - p) for this p. csrc/philox.h computes the same bits in
C++. Other random numbers have 32 bits: word g % 4 of block(g // 4). (Initial weights, see sharding/initialization.py,
use NumPy's generator, the 64-bit version of Philox.)
"""

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_STEPS = 1 << 16  # p is a multiple of 1 / _STEPS

MASK_VERSION = 2
"""Version of these random numbers, in checkpoints. 1 had ten rounds, and 32 bits for an element in dropout."""


def philox4x32(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return seven rounds of Philox. Every 32-bit word is an int64 tensor: 4 counter words, 2 key words, one shape."""
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(rng_state: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the random 32-bit word, in [0, 2^32), of every global index; int64 in and out."""
    seed, offset = rng_state.unbind()
    block = index >> 2
    lane = index & 3
    w0, w1, w2, w3 = philox4x32((*_halves(block), *_halves(offset)), _halves(seed))
    return torch.where(lane < 2, torch.where(lane == 0, w0, w1), torch.where(lane == 2, w2, w3))


def rows_of_random_words(rng_state: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """Return random_words for n rows of consecutive indices: int64 [n, length]. It draws each block of four once.

    Args:
        rng_state: as random_words.
        starts: int64 [n], the first index of each row.
        length: of every row.
    """
    seed, offset = rng_state.unbind()
    blocks = (starts >> 2)[:, None] + torch.arange((length + 6) // 4, device=starts.device)
    words = torch.stack(philox4x32((*_halves(blocks), *_halves(offset)), _halves(seed)), dim=-1).flatten(1)
    index = (starts & 3)[:, None] + torch.arange(length, device=starts.device)
    return words.gather(1, index)


def keep_mask(rng_state: torch.Tensor, index: torch.Tensor, p: float) -> torch.Tensor:
    """Return, for each global index, whether dropout with probability p < 1 keeps the element; bool."""
    seed, offset = rng_state.unbind()
    block, half = index >> 3, index & 7
    w0, w1, w2, w3 = philox4x32((*_halves(block), *_halves(offset)), _halves(seed))
    word = torch.where(half < 4, torch.where(half < 2, w0, w1), torch.where(half < 6, w2, w3))
    return ((word >> 16 * (half & 1)) & 0xFFFF) >= drop_threshold(p)


def drop_threshold(p: float) -> int:
    """Return p * 2^16, rounded; less than 2^16, since only p = 1, without random numbers, drops everything."""
    return min(int(p * _STEPS + 0.5), _STEPS - 1)


def keep_scale(p: float) -> float:
    """Return the factor of kept elements: 1 / (1 - p) for the rounded p; 0 for p = 1."""
    return _STEPS / (_STEPS - drop_threshold(p)) if p < 1.0 else 0.0


def _halves(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return value & _MASK, (value >> 32) & _MASK


def _product(a: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the high and low 32 bits of a * multiplier, computed by halves of a so that all fits in 63 bits."""
    high, low = (a >> 16) * multiplier, (a & 0xFFFF) * multiplier
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & _MASK
