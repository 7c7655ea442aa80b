"""Amounts as people write them: 100B tokens, 64 GPUs, 12.3 s."""

import math
import re

from fused_megatron.checks import InputError, check

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_MOST = 1 << 62


def parse_amount(name: str, text: str) -> int:
    """Read a number with an optional unit: K, M, B (10^9) or T (10^12).

    Raises:
        InputError: another form, below 1, or beyond 64 bits.
    """
    match = re.fullmatch(r"([0-9]{1,18})(?:\.([0-9]{1,18}))?([kmbt]?)", text.strip().lower().replace("_", ""))
    if match is None or not text.isascii():
        raise InputError(f"{name}={text!r:.40} must be a number such as 64, 4M, 100B or 1.5T")
    whole, fraction, unit = match[1], match[2] or "", _UNITS[match[3]]
    value = (int(whole + fraction) * unit) // 10 ** len(fraction)
    check(value >= 1, f"{name}={text.strip()} must be 1 or more")
    check(value < _MOST, f"{name}={text.strip()} must be a number of 64 bits")
    return value


def parse_price(text: str) -> float:
    """Read the price of a GPU hour: a number above 0 and below a million.

    Raises:
        InputError: anything else.
    """
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    check(0 < price < 1e6, f"price={text!r:.40} must be a number above 0, of one GPU and hour, such as 2.50")
    return price


def amount_text(value: float) -> str:
    """Return a number as people write it: 6.74B, 32k."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def round_to_even_share(num_sequences: float, num_gpus: int) -> int:
    """Return the nearest number of sequences that many numbers of replicas divide.

    It is a multiple of the odd part of num_gpus (if the batch is large enough) times a power of two, both together at
    most an eighth of the batch: the result differs by at most 6 % from the wanted number.
    """
    limit = max(1.0, num_sequences / 8)
    odd = num_gpus // (num_gpus & -num_gpus)
    unit = odd if odd <= limit else 1
    unit *= 1 << int(math.log2(max(1.0, limit / unit)))
    return max(1, round(num_sequences / unit)) * unit


def seconds_text(seconds: float) -> str:
    """Return a time with three digits: 12.3 s, 123 ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
