"""Start here when the measured times of a busy or slowed machine differ from those of an idle one."""

from fused_megatron.planning.prediction.measured_steps import StepTimes, median_probe_s, slowest_step


def test_steps_are_stated_at_a_speed_of_the_cores() -> None:
    # The second step ran on cores of half the speed, the third beside another process.
    times = StepTimes((1.0, 2.0, 1.5), (0.0, 0.0, 0.5), (0.01, 0.02, 0.01))
    assert times.median_s(without_waits=False) == 1.5
    assert times.median_s(without_waits=True, probe_s=0.01) == 1.0
    assert times.median_s(without_waits=True, probe_s=0.02) == 2.0
    assert StepTimes((3.0,), (0.0,)).median_s(without_waits=True, probe_s=0.01) == 3.0
    assert median_probe_s([times, StepTimes((1.0,), (0.0,), (0.03,))]) == 0.015
    assert median_probe_s([StepTimes((1.0,), (0.0,))]) is None


def test_other_processes_take_what_the_ranks_did_not_use() -> None:
    # Four ranks: seconds, wait for a core, probe, own seconds of cores, all seconds of cores.
    ranks = [
        (1.0, 0.5, 0.01, 0.4, 1.9),
        (1.1, 0.4, 0.03, 0.4, 1.9),
        (1.0, 0.5, 0.02, 0.4, 1.91),
        (1.0, 0.5, 0.02, 0.4, 1.9),
    ]
    seconds, wait, probe = slowest_step(ranks, cores=2)
    assert (seconds, round(wait, 9), round(probe, 9)) == (1.1, 0.15, 0.02)
    # With a core for each rank a rank waits for other processes only.
    assert slowest_step(ranks, cores=4)[1] == 0.5
