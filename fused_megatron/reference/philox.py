"""Counter-based random numbers for dropout (Philox) in plain PyTorch: the definition of the scheme.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011). rng_state is
(seed, offset), two int64. The element with global index g gets the random 32-bit word

    word(g) = philox4x32_10(counter=(g // 4, offset), key=seed)[g % 4]

where the 128-bit counter is (low 32 bits of g // 4, high 32 bits of g // 4, low of offset, high of offset) and the key
is (low of seed, high of seed). An element is kept if word(g) >= floor(p * 2^32), so that it is dropped with probability
p, to 2^-32. csrc/philox.h computes the same bits in C++. (Initial weights, see sharding/initialization.py, use NumPy's
generator, the 64-bit version of Philox.)
"""

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return ten rounds of Philox. Every 32-bit word is an int64 tensor: 4 counter words, 2 key words, one shape."""
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
    return random_words(rng_state, index) >= int(p * 2**32)


def _halves(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return value & _MASK, (value >> 32) & _MASK


def _product(a: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the high and low 32 bits of a * multiplier, computed by halves of a so that all fits in 63 bits."""
    high, low = (a >> 16) * multiplier, (a & 0xFFFF) * multiplier
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & _MASK
