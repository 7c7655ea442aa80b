"""Start here when measured times of a busy machine differ much from the times of an idle one."""

import time

from fused_megatron.observe.core_time import CoreTime, quiet_median_s


def test_a_clock_tells_waits_from_the_rest() -> None:
    clock = CoreTime()
    time.sleep(0.01)
    wall_s, wait_s = clock.stop()
    assert wall_s >= 0.01 and 0.0 <= wait_s <= wall_s


def test_the_median_leaves_out_the_samples_with_most_waits() -> None:
    quiet = [(1.0, 0.0), (1.1, 0.05), (0.95, 0.0)]
    assert quiet_median_s(quiet) == 0.975
    assert quiet_median_s([*quiet, (9.0, 3.0), (5.0, 4.0), (20.0, 11.0)]) == 1.0
    assert quiet_median_s([(3.0, 1.0)]) == 2.0
