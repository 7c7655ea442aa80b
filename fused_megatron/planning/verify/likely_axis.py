"""Search for the part of a layout that makes it differ: each part is tried by itself, then two of them together."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fused_megatron.planning.verify.layout_parts import (
    DATA,
    MICROBATCHES,
    NEEDS,
    OVERLAP,
    PIPELINE,
    RECOMPUTE,
    SEQUENCE,
    TENSOR,
)


@dataclass(frozen=True)
class Cause:
    """Which part of a layout is at fault.

    Attributes:
        parts: that differ by themselves; or, with `together`, that differ only with each other.
        together: no part differs by itself.
        right: parts that were tried and do not differ.
    """

    parts: tuple[str, ...]
    together: bool
    right: tuple[str, ...]

    def describe(self) -> str:
        """In words."""
        right = f"; by {'itself' if len(self.right) == 1 else 'themselves'} right: {', '.join(self.right)}"
        names = " with ".join(self.parts) if self.together else ", ".join(self.parts)
        how = " (only together)" if self.together else ""
        return f"{names}{how}{right if self.right else ''}"


def find_cause(parts: Sequence[str], differs: Callable[[tuple[str, ...]], bool]) -> Cause:
    """The cause of a difference that a layout with all these parts has.

    Args:
        parts: in use, in the order of layout_parts.NEEDS.
        differs: trains with these parts only, and returns whether the result differs from the result of one process.
    """
    if len(parts) == 1:
        return Cause(tuple(parts), False, ())
    wrong: list[str] = []
    right: list[str] = []
    for part in parts:
        if any(need in wrong for need in _before(part)):
            continue
        if differs(_with_needs(part, parts)):
            wrong.append(part)
            if part == MICROBATCHES:  # every other part is tried with them
                break
        else:
            right.append(part)
    if wrong:
        return Cause(tuple(wrong), False, tuple(right))
    mains = [part for part in (RECOMPUTE, TENSOR, PIPELINE, DATA) if part in parts]
    if len(mains) > 2:
        for pair in itertools.combinations(mains, 2):
            if differs(_ordered({each for part in pair for each in _family(part, parts)}, parts)):
                return Cause(pair, True, tuple(right))
    return Cause(tuple(mains), True, tuple(right))


def _before(part: str) -> tuple[str, ...]:
    """Parts at whose fault this one is not tried."""
    return (*NEEDS[part], SEQUENCE) if part == OVERLAP else NEEDS.get(part, ())


def _with_needs(part: str, parts: Sequence[str]) -> tuple[str, ...]:
    return _ordered({part, MICROBATCHES, *_before(part)}, parts)


def _family(part: str, parts: Sequence[str]) -> set[str]:
    return {part, MICROBATCHES, *((SEQUENCE, OVERLAP) if part == TENSOR else ())}


def _ordered(wanted: set[str], parts: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for part in parts if part in wanted)
