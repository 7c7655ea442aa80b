"""How many warps a multiprocessor holds, by the limits of each architecture (CUDA programming guide, table of
technical specifications)."""

from dataclasses import dataclass

WARP = 32


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor."""

    warps: int
    blocks: int
    shared_bytes: int


LIMITS = {
    "sm_80": Limits(64, 32, 164 * 1024),
    "sm_90a": Limits(64, 32, 228 * 1024),
    "sm_100a": Limits(64, 32, 228 * 1024),
}
_REGISTERS = 65536
_PARTITIONS = 4  # each with a quarter of the registers, and whole warps
_REGISTER_UNIT = 256  # registers are given to a warp in such portions
_SHARED_UNIT = 128
_SHARED_RESERVED = 1024  # for the system, a block


def occupancy(arch: str, threads: int, registers: int, shared_bytes: int) -> float:
    """Resident warps over the most there can be.

    Args:
        arch: a key of LIMITS.
        threads: of a block.
        registers: of a thread.
        shared_bytes: of a block, static and dynamic.
    """
    limits = LIMITS[arch]
    warps = -(-threads // WARP)
    per_warp = _rounded(max(1, registers) * WARP, _REGISTER_UNIT)
    by_registers = _REGISTERS // _PARTITIONS // per_warp * _PARTITIONS // warps
    by_shared = limits.shared_bytes // (_rounded(shared_bytes, _SHARED_UNIT) + _SHARED_RESERVED)
    blocks = min(limits.blocks, limits.warps // warps, by_registers, by_shared)
    return blocks * warps / limits.warps


def _rounded(value: int, unit: int) -> int:
    return -(-value // unit) * unit
