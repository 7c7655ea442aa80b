"""Search for the part of a layout that is at fault: it tries each part by itself, then pairs of parts."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fused_megatron.planning.verify.layout_parts import (
    CONTEXT,
    DATA,
    EXPERT,
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
    """The parts of a layout that are at fault.

    Attributes:
        parts: parts that differ by themselves; with `together`, parts that differ only in combination.
        together: whether no part differs by itself.
        right: parts that were tried and do not differ.
    """

    parts: tuple[str, ...]
    together: bool
    right: tuple[str, ...]

    def describe(self) -> str:
        """Return the cause as text."""
        right = f"; by {'itself' if len(self.right) == 1 else 'themselves'} right: {', '.join(self.right)}"
        names = " with ".join(self.parts) if self.together else ", ".join(self.parts)
        how = " (only together)" if self.together else ""
        return f"{names}{how}{right if self.right else ''}"


def find_cause(parts: Sequence[str], differs: Callable[[tuple[str, ...]], bool]) -> Cause:
    """Find the cause of a difference between a layout with all these parts and one process.

    Args:
        parts: the parts in use, in the order of layout_parts.NEEDS.
        differs: trains with only the given parts, and returns whether the result differs from one process.
    """
    if len(parts) == 1:
        return Cause(tuple(parts), False, ())
    wrong: list[str] = []
    right: list[str] = []
    for part in parts:
        if any(need in wrong for need in _before(part)):
            continue
        if differs(_with_needs(part, parts)):
            if part == EXPERT and differs(_ordered({MICROBATCHES, *NEEDS[EXPERT]}, parts)):
                continue  # the parts that it needs differ together
            wrong.append(part)
            if part == MICROBATCHES:  # every other part would be tried with microbatches
                break
        else:
            right.append(part)
    if wrong:
        return Cause(tuple(wrong), False, tuple(right))
    mains = [part for part in (RECOMPUTE, TENSOR, PIPELINE, CONTEXT, DATA) if part in parts]
    if len(mains) > 2:
        for pair in itertools.combinations(mains, 2):
            if differs(_ordered({each for part in pair for each in _family(part, parts)}, parts)):
                return Cause(pair, True, tuple(right))
    return Cause((*mains, *(part for part in parts if part == EXPERT and part not in right)), True, tuple(right))


def _before(part: str) -> tuple[str, ...]:
    """Return the parts that must be right before this part is tried."""
    return (*NEEDS[part], SEQUENCE) if part == OVERLAP else NEEDS.get(part, ())


def _with_needs(part: str, parts: Sequence[str]) -> tuple[str, ...]:
    return _ordered({part, MICROBATCHES, *_before(part)}, parts)


def _family(part: str, parts: Sequence[str]) -> set[str]:
    return {part, MICROBATCHES, *((SEQUENCE, OVERLAP) if part == TENSOR else ())}


def _ordered(wanted: set[str], parts: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for part in parts if part in wanted)
