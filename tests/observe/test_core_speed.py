"""Start here when measured times follow the speed of the machine's cores, or do not follow it."""

import sys
import time

import pytest

from fused_megatron.observe.core_speed import CoreSpeed
from fused_megatron.observe.core_time import cores_busy_s


def test_a_probe_takes_time_of_the_core() -> None:
    speed = CoreSpeed()
    begin = time.thread_time()
    probes = [speed.probe_s() for _ in range(3)]
    assert min(probes) > 0
    assert sum(probes) <= time.thread_time() - begin


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/stat")
def test_busy_cores_count_this_process() -> None:
    busy, own = cores_busy_s(), time.process_time()
    while time.process_time() - own < 0.1:
        pass
    assert cores_busy_s() - busy >= 0.05  # the kernel counts in steps of a hundredth
