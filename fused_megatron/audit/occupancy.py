"""Limits of a multiprocessor in NVIDIA's CUDA programming guide and data sheets, and the resident warps by them."""

from dataclasses import dataclass

WARP = 32


@dataclass(frozen=True)
class Limits:
    """Limits of one multiprocessor."""

    warps: int
    blocks: int
    shared_bytes: int


LIMITS = {
    "sm_80": Limits(64, 32, 164 * 1024),
    "sm_90a": Limits(64, 32, 228 * 1024),
    "sm_100a": Limits(64, 32, 228 * 1024),
}
# Memory bandwidth of a multiprocessor in bytes per clock: of an A100 (2.04 TB/s, 108 multiprocessors, 1.41 GHz); of an
# H100 (3.35 TB/s) and an H200 (4.8 TB/s), both with 132 at 1.755 GHz; of a B200 (8 TB/s, 148 at 1.85 GHz).
BANDWIDTHS = {"sm_80": (13.4,), "sm_90a": (14.5, 20.7), "sm_100a": (29.2,)}
ISSUED_PER_CLOCK = 4 * WARP  # instructions of threads that a multiprocessor issues in a clock

_REGISTERS = 65536
_PARTITIONS = 4  # of a multiprocessor; each has a quarter of the registers
_REGISTER_UNIT = 256  # a warp gets registers in multiples of this
_SHARED_UNIT = 128  # a block gets shared bytes in multiples of this
_SHARED_RESERVED = 1024  # bytes per block for the system


def occupancy(arch: str, threads: int, registers: int, shared_bytes: int) -> float:
    """Return resident warps / maximum warps of a multiprocessor.

    Args:
        arch: a key of LIMITS.
        threads: per block.
        registers: per thread.
        shared_bytes: per block, static and dynamic.
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
