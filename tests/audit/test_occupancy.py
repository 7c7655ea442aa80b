"""Start here when an occupancy of the kernel ledger looks wrong."""

import pytest

from fused_megatron.audit.occupancy import occupancy


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "expected"),
    [
        ("sm_90a", 256, 32, 0, 1.0),
        ("sm_90a", 256, 40, 0, 0.75),
        ("sm_80", 128, 64, 0, 0.5),
        ("sm_90a", 128, 124, 0, 0.25),
        ("sm_80", 1024, 64, 0, 0.5),
        ("sm_80", 256, 32, 100 * 1024, 0.125),
        ("sm_90a", 256, 32, 100 * 1024, 0.25),
        ("sm_100a", 512, 128, 227 * 1024, 0.25),
        ("sm_80", 32, 16, 0, 0.5),
        ("sm_90a", 1024, 65, 0, 0.0),
    ],
)
def test_occupancy(arch, threads, registers, shared, expected):
    assert occupancy(arch, threads, registers, shared) == expected
