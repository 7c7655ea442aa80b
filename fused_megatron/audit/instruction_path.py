"""Instructions that a thread issues for the elements of one iteration, from the machine code of a kernel.

A listing has branches that a run does not take: a residual, a short last row. So the count is the length of one path
through the main loop (the innermost loop with most of the wide accesses; without such a loop, through the whole
kernel): it moves bytes in the ratio of the kernel, and of such paths it has most arithmetic, then fewest instructions.
Predicated instructions count, since they take an issue slot.
"""

import bisect
import itertools
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

_SMALL_BYTES = 4.0  # a kernel moves a few bytes besides its streams, for example statistics of rows
_ARITHMETIC = ("FADD", "FMUL", "FFMA", "FSEL", "FMNMX", "MUFU", "HADD2", "HMUL2", "HFMA2", "DADD", "DFMA")
_CALL = 40  # instructions of a subroutine, for example the exact division: more than any path around it

Blocks = dict[int, "Block"]
Moved = tuple[int, int]  # bytes loaded and stored


@dataclass(frozen=True)
class Instruction:
    """One line of a listing. target: the address to which it branches, or None."""

    address: int
    name: str
    is_conditional: bool
    target: int | None


@dataclass(frozen=True)
class Block:
    """Instructions without a branch between them.

    Attributes:
        cost: number of instructions.
        loaded, stored: bytes of global memory, by wide accesses.
        calculates: whether it contains arithmetic on the elements.
        next: addresses of the following blocks; without any the kernel ends here.
    """

    cost: int
    loaded: int
    stored: int
    calculates: bool
    next: tuple[int, ...]


@dataclass(frozen=True)
class InstructionPath:
    """Instructions of a path, and the bytes that a thread moves on it by wide accesses."""

    instructions: int
    loaded: int
    stored: int


def listing(binary: Path, arch: str, symbol: str, cuobjdump: str) -> str:
    """Return the machine code of one kernel as text."""
    command = [cuobjdump, "-sass", "-arch", arch, "-fun", symbol, str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parsed(text: str) -> list[Instruction]:
    """Parse the first function of a listing."""
    found: list[Instruction] = []
    for address, guard, body in re.findall(r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ )? *([A-Z][^;]*);", text):
        number = int(address, 16)
        if found and number <= found[-1].address:
            break  # the same kernel again: a library lists it once for each file that uses it
        name = body.split()[0]
        target = re.search(r"0x([0-9a-f]+)\s*$", body) if name.split(".")[0] in ("BRA", "UBRA", "CALL") else None
        # "BRA P0, 0x10" and "BRA.DIV UR4, 0x10" have their condition among the operands.
        inside = name.startswith("BRA.DIV") or bool(re.match(r"U?BRA\S* +!?U?P", body))
        found.append(Instruction(number, name, bool(guard) or inside, int(target.group(1), 16) if target else None))
    return found


def blocks_of(instructions: list[Instruction]) -> Blocks:
    """Return the basic blocks by address."""
    starts = {instructions[0].address}
    for before, after in itertools.pairwise(instructions):
        if _ends_block(before):
            starts |= {after.address} | ({before.target} if before.target is not None else set())
    blocks: Blocks = {}
    group: list[Instruction] = []
    for i, instruction in enumerate(instructions):
        group.append(instruction)
        following = instructions[i + 1].address if i + 1 < len(instructions) else None
        if following is not None and following not in starts:
            continue
        names = [one.name for one in group]
        nexts = _successors(instruction, following)
        cost = len(group) + _CALL * sum(name.startswith("CALL") for name in names)
        loaded = sum(_wide_bytes(name) for name in names if name.startswith("LDG"))
        stored = sum(_wide_bytes(name) for name in names if name.startswith("STG"))
        calculates = cost == len(group) and any(name.startswith(_ARITHMETIC) for name in names)
        blocks[group[0].address] = Block(cost, loaded, stored, calculates, nexts)
        group = []
    return blocks


def _ends_block(instruction: Instruction) -> bool:
    return instruction.name.split(".")[0] in ("BRA", "UBRA", "EXIT", "RET", "BRX")


def _successors(last: Instruction, following: int | None) -> tuple[int, ...]:
    kind = last.name.split(".")[0]
    goes_on = () if following is None else (following,)
    if kind == "BRX":  # a jump table, whose first case follows
        return goes_on
    if kind in ("EXIT", "RET"):
        return goes_on if last.is_conditional else ()
    if kind in ("BRA", "UBRA"):
        target = () if last.target is None else (last.target,)
        return (*target, *goes_on) if last.is_conditional else target
    return goes_on


def _wide_bytes(name: str) -> int:
    # 16-bit results beside float32 ones take 8 bytes. A load of 8 bytes is a pointer or an index.
    return 16 if ".128" in name else 8 if ".64" in name and name.startswith("STG") else 0


def loops_of(blocks: Blocks, inside: frozenset[int] | None = None) -> list[frozenset[int]]:
    """Return the loops, outer ones before the loops within them, as the addresses of their blocks."""
    loops = []
    for part in _components(blocks, frozenset(blocks) if inside is None else inside):
        if len(part) > 1 or any(start in blocks[start].next for start in part):
            loops += [part, *loops_of(blocks, part - {_header(blocks, part)})]
    return loops


def _header(blocks: Blocks, loop: frozenset[int]) -> int:
    entries = {to for at, block in blocks.items() if at not in loop for to in block.next if to in loop}
    return min(entries or loop)


def _components(blocks: Blocks, inside: frozenset[int]) -> list[frozenset[int]]:
    """Return the strongly connected components (Kosaraju), by their first address."""
    order: list[int] = []
    seen: set[int] = set()
    backwards: dict[int, list[int]] = {at: [] for at in inside}
    for at in inside:
        for to in blocks[at].next:
            if to in inside:
                backwards[to].append(at)
    for root in sorted(inside):
        _visit(root, lambda at: blocks[at].next, inside, seen, order)
    components = []
    seen = set()
    for root in reversed(order):
        part: list[int] = []
        _visit(root, backwards.__getitem__, inside, seen, part)
        if part:
            components.append(frozenset(part))
    return sorted(components, key=min)


def _visit(
    root: int, neighbours: Callable[[int], Iterable[int]], inside: frozenset[int], seen: set[int], order: list[int]
) -> None:
    """Append the blocks that are reached from root, each after those that are reached from it."""
    if root in seen:
        return
    seen.add(root)
    stack = [(root, iter(neighbours(root)))]
    while stack:
        at, rest = stack[-1]
        for to in rest:
            if to in inside and to not in seen:
                seen.add(to)
                stack.append((to, iter(neighbours(to))))
                break
        else:
            order.append(at)
            stack.pop()


def main_paths(text: str) -> list[InstructionPath]:
    """Return, for each number of bytes, the path through the main loop (or the kernel) that moves them.

    Args:
        text: of listing().
    """
    blocks = blocks_of(parsed(text))
    inside, start = frozenset(blocks), min(blocks)
    ends = {at for at, block in blocks.items() if not block.next}
    loops = loops_of(blocks)
    # A loop without arithmetic beside one with arithmetic only requests the first rows.
    loops = [loop for loop in loops if any(blocks[at].calculates for at in loop)] or loops
    most = max((_moved(blocks, loop) for loop in loops), default=0)
    if 4 * most >= _moved(blocks, inside) > 0:  # else a loop beside the streams, which are outside of loops
        inside = [loop for loop in loops if _moved(blocks, loop) == most][-1]
        start = _header(blocks, inside)
        ends = {at for at in inside if start in blocks[at].next}
    return _best_paths(blocks, inside, start, ends)


def under_loads(text: str) -> float | None:
    """Return the part of the main loop's exponentials that follow its last wide load: they run while it is on its way.

    None: no loop has both.

    Args:
        text: of listing().
    """
    instructions = parsed(text)
    blocks = blocks_of(instructions)
    starts = sorted(blocks)
    shares = []
    for loop in loops_of(blocks):
        names = [one.name for one in instructions if starts[bisect.bisect(starts, one.address) - 1] in loop]
        loads = [at for at, name in enumerate(names) if name.startswith("LDG") and ".128" in name]
        exponentials = [at for at, name in enumerate(names) if name.startswith("MUFU.EX2")]
        if loads and exponentials:
            shares.append(sum(at > loads[-1] for at in exponentials) / len(exponentials))
    return shares[-1] if shares else None


def _moved(blocks: Blocks, inside: frozenset[int]) -> int:
    return sum(blocks[at].loaded + blocks[at].stored for at in inside)


def _best_paths(blocks: Blocks, inside: frozenset[int], start: int, ends: set[int]) -> list[InstructionPath]:
    """Return the paths with most arithmetic and then fewest instructions; a loop inside is taken once."""
    ordered, onward = _acyclic(blocks, inside, start)
    found: dict[int, dict[Moved, tuple[int, int]]] = {start: {(0, 0): (0, 0)}}  # (-arithmetic blocks, instructions)
    results: dict[Moved, tuple[int, int]] = {}
    for at in ordered:
        block = blocks[at]
        here = {
            (loaded + block.loaded, stored + block.stored): (arithmetic - block.calculates, cost + block.cost)
            for (loaded, stored), (arithmetic, cost) in found.get(at, {}).items()
        }
        targets = [found.setdefault(to, {}) for to in onward[at]] + ([results] if at in ends else [])
        for moved, value in here.items():
            for target in targets:
                target[moved] = min(target.get(moved, value), value)
    return [InstructionPath(cost, *moved) for moved, (_, cost) in results.items()]


def _acyclic(blocks: Blocks, inside: frozenset[int], start: int) -> tuple[list[int], dict[int, list[int]]]:
    """Return the blocks in topological order, and the following blocks of each without the way back into a loop."""
    order: list[int] = []
    _visit(start, lambda at: blocks[at].next, inside, set(), order)
    order.reverse()
    rank = {at: i for i, at in enumerate(order)}
    return order, {at: [to for to in blocks[at].next if rank.get(to, -1) > rank[at]] for at in order}


def instructions_per_element(
    paths: Iterable[InstructionPath], loaded: float, stored: float, elements: int | None = None
) -> float | None:
    """Return the instructions of a thread for one element, or None if no path moves the right bytes.

    Args:
        paths: of main_paths().
        loaded, stored: bytes that the kernel loads and stores for an element.
        elements: of an iteration and thread; the path may have other accesses that a predicate switches off. None:
            of the path that moves most bytes in the right ratio.
    """
    if loaded + stored == 0:
        return None
    if elements is not None:
        least = [elements * number - _SMALL_BYTES for number in (loaded, stored)]
        fit = [path for path in paths if path.loaded > least[0] and path.stored > least[1]]
        return min(fit, key=_bytes_then_instructions).instructions / elements if fit else None
    best = (0, 0.0)
    for path in paths:
        count = (path.loaded + path.stored) / (loaded + stored)
        if count >= 1 and abs(path.loaded - loaded * count) < _SMALL_BYTES:
            best = max(best, (path.loaded + path.stored, -path.instructions / round(count)))
    return -best[1] if best[0] else None


def _bytes_then_instructions(path: InstructionPath) -> tuple[int, int]:
    return path.loaded + path.stored, path.instructions
