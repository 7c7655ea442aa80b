"""Start here when a schedule breaks a rule, or has more bubble or memory than its formula says."""

import pytest

from fused_megatron.checks import InputError
from fused_megatron.pipeline import SCHEDULES, Costs, Schedule, build_schedule, lower, schedule_findings, simulate
from fused_megatron.pipeline.schedule.action import peak_weight_versions, weight_versions

EQUAL, UNEQUAL = (1.0, 1.0, 1.0), (1.0, 1.3, 0.7)
# V-schedules are made for equal times; for other times there is no short formula.
TIMES = {name: (EQUAL,) if name in ("v_half", "zb_v", "dual_pipe_v") else (EQUAL, UNEQUAL) for name in SCHEDULES}


def cases(ranks, per_rank, microbatches):
    """Yield every (name, ranks, stages per rank, microbatches) that the schedules allow."""
    for name, kind in SCHEDULES.items():
        for p in ranks:
            for v in (kind.stages_per_rank,) if kind.stages_per_rank else per_rank:
                for m in microbatches:
                    if name != "pipedream_2bw" or m >= p:
                        yield name, p, v, m


def built(name: str, p: int, v: int, m: int) -> Schedule:
    synchronous = SCHEDULES[name].weights == "synchronous"
    tied = ((0, p * v - 1),) if synchronous and p * v > 1 else ()
    return build_schedule(name, p, m, v, 1 if synchronous else 3, tied)


def expected_bubble(name, p, v, m, forward, input_grad, weight_grad):
    """Return the formula's bubble; None if there is no formula (fewer microbatches than the pattern needs)."""
    whole = forward + input_grad + weight_grad
    if name in ("gpipe", "1f1b", "pipedream", "pipedream_2bw"):
        return (p - 1) * whole
    if name in ("interleaved_1f1b", "looped_breadth_first"):
        # With m < p a rank waits for the first microbatch to return, once for each further stage.
        return ((p - 1) + (v - 1) * max(0, p - m)) * whole / v
    if name in ("zb_h1", "interleaved_zero_bubble"):
        return (p - 1) * (forward + input_grad - weight_grad) / v if m >= p else None
    if name == "zb_v":
        return (p - 1) * forward / 2 if m >= 2 * p - 1 else None
    if name == "dual_pipe_v":
        return (p - 1) * (forward + input_grad - weight_grad) / 2 if m >= 2 * p else None
    # v_half; with 6 ranks one hop of its pattern has to wait for a unit.
    return (max(0.0, 2 * p - 2.5) + (p == 6)) if m >= p else None


def expected_peak(name, p, v, m, rank):
    """Return the peak number of activations, each of one stage and one microbatch."""
    if name in ("gpipe", "looped_breadth_first"):
        return m * v
    if name in ("1f1b", "pipedream", "pipedream_2bw") or (name == "interleaved_1f1b" and v == 1):
        in_flight = m if SCHEDULES[name].weights == "synchronous" else 3 * m
        return min(in_flight, p - rank)
    groups = max(1, m // p)
    first_group = -(-m // groups)
    if name == "interleaved_1f1b":
        return min(m * v, 2 * (p - 1 - rank) + (v - 1) * first_group + 1)
    if name in ("zb_h1", "interleaved_zero_bubble"):
        return min(m * v, p + (v - 1) * first_group)
    if name == "zb_v":
        return 2 * p if m >= 2 * p - 1 else None
    if name == "dual_pipe_v":
        return 2 * p + 1 if m >= 2 * p else None
    return None


def check_case(name: str, p: int, v: int, m: int) -> None:
    schedule = built(name, p, v, m)
    assert schedule_findings(schedule) == []
    lowered = lower(schedule)
    assert schedule_findings(lowered) == []
    for times in TIMES[name]:
        costs = Costs(*(time / v for time in times))
        timeline = simulate(schedule, costs)
        assert not timeline.stuck
        bubble = expected_bubble(name, p, v, m, *times)
        if bubble is not None:
            assert timeline.bubble == pytest.approx(bubble, abs=1e-9)
        assert simulate(lowered, costs).makespan == timeline.makespan
    for rank, peak in enumerate(timeline.peak_live):
        wanted = expected_peak(name, p, v, m, rank)
        assert wanted is None or peak == wanted
        if name == "v_half":
            assert peak <= max(p + p % 2, 4 if p > 1 else 2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rules_bubble_and_memory(name: str) -> None:
    for case in cases((1, 2, 3, 4), (1, 2, 3), (1, 2, 3, 4, 7, 8, 13)):
        if case[0] == name:
            check_case(*case)


@pytest.mark.slow
@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("name", SCHEDULES)
def test_rules_bubble_and_memory_of_all(name: str, p: int) -> None:
    for case in cases((p,), (1, 2, 3, 4), range(1, 41)):
        if case[0] == name:
            check_case(*case)


def test_zb_v_never_idles_between_its_first_and_last_action() -> None:
    for p in (2, 4, 8):
        timeline = simulate(build_schedule("zb_v", p, 2 * p), Costs(0.5, 0.5, 0.5))
        assert max(timeline.idle_inside) == pytest.approx(0)


def test_v_half_keeps_half_of_1f1b_for_two_thirds_of_its_bubble() -> None:
    for p in (4, 8):
        half = simulate(build_schedule("v_half", p, 24), Costs(0.5, 0.5, 0.5))
        whole = simulate(build_schedule("1f1b", p, 24))
        assert max(half.peak_live) / 2 == max(whole.peak_live) / 2
        assert half.bubble < 0.66 * whole.bubble


def test_v_half_loses_where_times_are_not_equal() -> None:
    bubbles = [simulate(build_schedule("v_half", 8, m), Costs(0.5, 0.65, 0.35)).bubble for m in (16, 32)]
    assert bubbles[1] > bubbles[0] > 0
    assert bubbles[1] > simulate(build_schedule("1f1b", 8, 32), Costs(*UNEQUAL)).bubble


def test_weights_of_2bw_are_one_step_old_and_two_are_kept() -> None:
    schedule = build_schedule("pipedream_2bw", 4, 4, num_steps=5)
    versions = weight_versions(schedule)
    assert {versions[stage, m] for stage in range(4) for m in range(8)} == {0}
    assert all(versions[stage, m] == m // 4 - 1 for stage in range(4) for m in range(8, 20))
    assert max(peak_weight_versions(schedule)) == 2
    # A microbatch never needs weights that its stage has not made yet.
    for actions in schedule.actions:
        made = 0
        for stage, kind, m in actions:
            made += kind == "UPDATE"
            assert kind != "F" or versions[stage, m] <= made


def test_stashed_weights_are_older_the_more_ranks_follow() -> None:
    schedule = build_schedule("pipedream", 4, 8, num_steps=2)
    versions = weight_versions(schedule)
    for stage in range(4):
        assert [versions[stage, m] for m in range(16)] == [max(0, m - (3 - stage)) for m in range(16)]
    assert peak_weight_versions(schedule) == [4, 3, 2, 1]


@pytest.mark.parametrize(("arguments", "message"), [
    (("1f2b", 2, 4), "schedule='1f2b' must be one of: gpipe, "),
    (("1f1b", 0, 4), "num_ranks=0 must be 1 or more"),
    (("1f1b", 2, 0), "num_microbatches=0 must be 1 or more"),
    (("interleaved_1f1b", 2, 4, 0), "stages_per_rank=0 must be 1 or more"),
    (("1f1b", 2, 4, 2), "stages_per_rank=2 must be 1 for 1f1b (others: interleaved_1f1b, "),
    (("zb_v", 2, 4, 1), "stages_per_rank=1 must be 2 for zb_v"),
    (("1f1b", 2, 4, 1, 2), "num_steps=2 must be 1 for 1f1b"),
    (("pipedream_2bw", 4, 3), "num_microbatches=3 must be at least num_ranks=4 for pipedream_2bw"),
    (("1f1b", 2, 4, 1, 1, ((0, 2),)), "tied=(0, 2) must name two or more different stages of 0 to 1"),
    (("1f1b", 2, 4, 1, 1, ((0,),)), "tied=(0,) must name two or more"),
    (("pipedream", 2, 4, 1, 1, ((0, 1),)), "tied weights need a synchronous schedule"),
])  # fmt: skip
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError) as error:
        build_schedule(*arguments)
    assert message in str(error.value)


def test_costs_that_do_not_fit() -> None:
    schedule = build_schedule("1f1b", 2, 4)
    for costs, message in (
        (Costs(forward=(1.0,)), "forward: 1 times given, one for each of 2 stages wanted"),
        (Costs(weight_grad=-1.0), "costs: -1.0 must be 0 or more"),
    ):
        with pytest.raises(InputError) as error:
            simulate(schedule, costs)
        assert message in str(error.value)


def test_links_and_unequal_stages_take_their_time() -> None:
    schedule = build_schedule("gpipe", 2, 2)
    assert simulate(schedule, Costs(link_latency=0.5)).makespan == 9 + 2 * 0.5
    # The second message leaves when the first has left the channel.
    assert simulate(schedule, Costs(0.0, 0.0, 0.0, link_occupied=1.0)).makespan == 2 + 2
    assert simulate(schedule, Costs(forward=(1.0, 3.0))).makespan == 1 + 6 + 6 - 2 + 2
    tied = lower(build_schedule("gpipe", 2, 1, tied=((0, 1),)))
    assert simulate(tied, Costs(reduce_grad=1.0, reduce_tied=2.0)).makespan == 6 + 1 + 2
