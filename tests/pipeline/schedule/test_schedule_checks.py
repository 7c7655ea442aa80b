"""Start here when a valid schedule is refused, or an invalid one is accepted."""

import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from fused_megatron import pipeline
from fused_megatron.pipeline import RULES, Action, Schedule, build_schedule, lower, parse_action, schedule_findings

GOOD = [
    lower(build_schedule("interleaved_1f1b", 3, 4, 2, tied=((0, 5),))),
    lower(build_schedule("zb_v", 3, 4, tied=((0, 5),))),
    lower(build_schedule("zb_h1", 4, 4, tied=((0, 3), (0, 1)))),
    lower(build_schedule("looped_breadth_first", 2, 3, 2)),
    lower(build_schedule("looped_breadth_first", 2, 3, 3), max_unsharded=2),
    lower(build_schedule("zb_v", 2, 4), max_unsharded=1),
    lower(build_schedule("pipedream_2bw", 3, 3, num_steps=3)),
    lower(build_schedule("pipedream", 2, 3, num_steps=2)),
    build_schedule("interleaved_zero_bubble", 3, 4, 2),
    build_schedule("dual_pipe_v", 3, 5),
]


Positions = list[tuple[Schedule, int, int]]  # rank and position of an action


def edited(schedule: Schedule, rank: int, actions: list[Action]) -> Schedule:
    lists = [*schedule.actions]
    lists[rank] = tuple(actions)
    return replace(schedule, actions=tuple(lists))


def is_named(schedule: Schedule, rank: int, actions: tuple[Action, ...]) -> bool:
    """Whether a finding is on the rank and names one of the actions, or the missing part of its backward."""
    names = {str(action) for action in actions}
    names |= {str(action._replace(kind=kind)) for action in actions if action.kind in "BIW" for kind in "BIW"}
    found = schedule_findings(schedule)
    return any(f.rank == rank and names & set(f.message.replace(",", " ").replace(":", " ").split()) for f in found)


@pytest.fixture(params=["some", pytest.param("every", marks=pytest.mark.slow)])
def chosen_positions(request: pytest.FixtureRequest) -> Positions:
    """Positions in the schedules: all, or for each kind of action on each rank the first and the middle one."""
    found = []
    for schedule in GOOD:
        for rank, actions in enumerate(schedule.actions):
            by_kind = defaultdict(list)
            for position, action in enumerate(actions):
                by_kind[action.kind].append(position)
            for positions in by_kind.values():
                some = sorted({positions[0], positions[len(positions) // 2]})
                found += [(schedule, rank, p) for p in (positions if request.param == "every" else some)]
    return found


def test_every_dropped_action_is_found_and_named(chosen_positions: Positions) -> None:
    for schedule, rank, position in chosen_positions:
        actions = list(schedule.actions[rank])
        dropped = actions.pop(position)
        assert is_named(edited(schedule, rank, actions), rank, (dropped,)), (schedule.name, str(dropped))


def test_every_duplicated_action_is_found_and_named(chosen_positions: Positions) -> None:
    for schedule, rank, position in chosen_positions:
        actions = list(schedule.actions[rank])
        actions.insert(position, actions[position])
        assert is_named(edited(schedule, rank, actions), rank, (actions[position],)), (schedule.name, position)


def test_every_retargeted_action_is_found_and_named(chosen_positions: Positions) -> None:
    random.seed(1)
    for schedule, rank, position in chosen_positions:
        action = schedule.actions[rank][position]
        others = [
            action._replace(stage=(action.stage + random.randint(1, schedule.num_stages - 1)) % schedule.num_stages)
        ]
        others.append(action._replace(stage=schedule.num_stages))
        if action.index is not None:
            others.append(action._replace(index=action.index + 1))
        if action.kind in "FBIW":
            others += [action._replace(kind=kind) for kind in "FBIW" if kind != action.kind]
        for other in others:
            actions = list(schedule.actions[rank])
            actions[position] = other
            assert is_named(edited(schedule, rank, actions), rank, (action, other)), (schedule.name, action, other)


def test_every_action_on_another_rank_is_found_and_named(chosen_positions: Positions) -> None:
    for schedule, rank, position in chosen_positions:
        actions, other = list(schedule.actions[rank]), (rank + 1) % schedule.num_ranks
        moved = actions.pop(position)
        mutated = edited(edited(schedule, rank, actions), other, [moved, *schedule.actions[other]])
        assert is_named(mutated, other, (moved,)), (schedule.name, str(moved))


def trains_alike(schedule: Schedule, good: Schedule) -> bool:
    """Run both as processes would, with values instead of tensors: the same sums in the same order, no rank stuck."""
    return play(schedule) == play(good)


def play(schedule: Schedule) -> object:
    """Return the sums of each stage, in order, with the versions of its weights; None if a rank waits forever.

    This code is independent of the checker: messages are values in queues, and a computation takes the next value.
    """
    queues, position = defaultdict(list), [0] * schedule.num_ranks
    inputs: list[dict] = [{} for _ in range(schedule.num_ranks)]
    outputs: list[dict] = [{} for _ in range(schedule.num_ranks)]
    summed, events, live, peak = defaultdict(list), defaultdict(list), Counter(), Counter()
    place, last, moved = schedule.placement, schedule.num_stages - 1, True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            if position[rank] == len(actions):
                continue
            stage, kind, m = action = actions[position[rank]]
            mine, made = inputs[rank], outputs[rank]
            if kind.startswith("SEND"):
                to = stage + (1 if kind == "SEND_F" else -1)
                if (stage, kind[-1], m) not in made:
                    return None
                queues[rank, place[to], kind[-1]].append((to, m))
            elif kind.startswith("RECV"):
                queue = queues[place[stage + (-1 if kind == "RECV_F" else 1)], rank, kind[-1]]
                if not queue:
                    continue
                if queue.pop(0) != (stage, m):
                    return None
                mine[stage, kind[-1], m] = True
            elif kind in ("F", "B", "I"):
                way, source = ("F", stage - 1) if kind == "F" else ("B", stage + 1)
                edge = not 0 <= source <= last
                local = not edge and place[source] == rank and (source, way, m) in made
                if not edge and not local and (stage, way, m) not in mine:
                    return None
                if kind != "F" and (stage, "F", m) not in made:
                    return None
                made[stage, way, m] = True
            if kind == "W" and (stage, "B", m) not in outputs[rank]:
                return None
            live[rank] += (kind == "F") - (kind in "BW")
            peak[rank] = max(peak[rank], live[rank])
            if kind in ("B", "W", "REDUCE_GRAD", "UPDATE"):
                summed[stage].append(str(action))
            if kind in ("B", "I"):
                events[stage].append(m)
            if kind == "REDUCE_TIED":
                own = [s for s in schedule.tied[m] if place[s] == rank]
                summed["tied", rank].append((m, [len([x for x in summed[s] if "GRAD" not in x]) for s in own]))
            position[rank] += 1
            moved = True
    over = any(peak[rank] > limit for rank, limit in enumerate(schedule.max_live or ()))
    stuck = over or any(p < len(actions) for p, actions in zip(position, schedule.actions, strict=True))
    # A REDUCE_TIED waits for the other ranks, so all ranks need the same order of groups; one group cannot deadlock.
    return (
        None
        if stuck
        else ({k: [x for x in v if "GRAD" not in str(x)] for k, v in summed.items()}, events, reduced(schedule))
    )


def reduced(schedule: Schedule) -> list:
    """Return for each stage the number of backwards before each reduction."""
    counts = defaultdict(list)
    for actions in schedule.actions:
        done = Counter()
        for stage, kind, _ in actions:
            done[stage] += kind in ("B", "W")
            if kind == "REDUCE_GRAD":
                counts[stage].append(done[stage])
    return sorted(counts.items())


def test_a_swap_is_found_or_changes_nothing(chosen_positions: Positions) -> None:
    random.seed(2)
    found = harmless = 0
    for schedule, rank, position in chosen_positions:
        if not schedule.lowered:
            continue
        size = len(schedule.actions[rank])
        for other in {min(position + 1, size - 1), random.randrange(size)} - {position}:
            actions = list(schedule.actions[rank])
            actions[position], actions[other] = actions[other], actions[position]
            mutated = edited(schedule, rank, actions)
            findings = schedule_findings(mutated)
            if findings:
                found += 1
                assert min(abs(f.rank - rank) for f in findings) <= schedule.num_ranks
            else:
                harmless += 1
                assert trains_alike(mutated, schedule), (schedule.name, rank, position, other)
    assert found > len(chosen_positions) // 2 and harmless > 30


def rules(lists: str, **changes) -> set[str]:
    """Return the rules that a schedule of two stages and microbatches breaks; text with a line for each rank."""
    actions = tuple(tuple(parse_action(word) for word in line.split()) for line in lists.strip().splitlines())
    schedule = Schedule("text", (0, 1), 2, actions, **changes)
    return {finding.rule for finding in schedule_findings(schedule)}


@pytest.mark.parametrize(("rule", "lists"), [
    ("", "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"),
    # torch's own validator accepts these: duplicates, a microbatch without backward, ranks that wait for each other.
    ("complete", "0F0 0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"),
    ("complete", "0F0 0F1 0B0\n1F0 1B0 1F1 1B1"),
    ("complete", "0F0 0F1 0B0 0I1\n1F0 1B0 1F1 1B1"),
    ("complete", "0F0 0F1 0B0 0I0 0B1\n1F0 1B0 1F1 1B1"),
    ("deadlock", "0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1"),
    ("order", "0F0 0F1 0B0 0B1\n1B0 1F0 1F1 1B1"),
    ("order", "0F0 0F1 0B0 0W1 0I1\n1F0 1B0 1F1 1B1"),
    ("placement", "0F0 0F1 0B0 0B1 1F0\n1B0 1F1 1B1"),
    ("ascending", "0F0 0F1 0B1 0B0\n1F0 1F1 1B1 1B0"),
    ("sharding", "0UNSHARD 0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"),
    ("sharding", "0F0 0UNSHARD 0F1 0B0 0B1 0RESHARD\n1F0 1B0 1F1 1B1"),
    ("sharding", "0UNSHARD 0UNSHARD 0F0 0F1 0B0 0B1 0RESHARD\n1F0 1B0 1F1 1B1"),
])  # fmt: skip
def test_rule_of_compute(rule: str, lists: str) -> None:
    assert rules(lists) == ({rule} if rule else set())


@pytest.mark.parametrize(("rule", "old", "new"), [
    ("paired", "0SEND_F0 ", ""),
    ("paired", "0F0 0SEND_F0", "0SEND_F0 0F0"),
    ("paired", "1RECV_F1 1F1", "1F1 1RECV_F1"),
    ("fifo", "0SEND_F0 0F1 0SEND_F1", "0F1 0SEND_F1 0SEND_F0"),
    ("deadlock", "0F1 0SEND_F1 0RECV_B0", "0RECV_B0 0F1 0SEND_F1"),
    ("reduction", "0REDUCE_GRAD ", ""),
    ("reduction", "0B1 0REDUCE_GRAD", "0REDUCE_GRAD 0B1"),
    ("reduction", " 0REDUCE_TIED0", ""),
    ("reduction", "0B1 0REDUCE_GRAD 0REDUCE_TIED0", "0REDUCE_TIED0 0B1 0REDUCE_GRAD"),
])  # fmt: skip
def test_rule_of_communication(rule: str, old: str, new: str) -> None:
    schedule = lower(build_schedule("gpipe", 2, 2, tied=((0, 1),)))
    text = "\n".join(" ".join(map(str, actions)) for actions in schedule.actions)
    assert old in text and rules(text, lowered=True, tied=((0, 1),)) == set()
    assert rules(text.replace(old, new), lowered=True, tied=((0, 1),)) == {rule}


def test_rule_memory() -> None:
    assert rules("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1", max_live=(1, 1)) == {"memory"}


def test_every_rule_has_a_test() -> None:
    assert set(RULES) == {
        "complete", "order", "placement", "ascending", "sharding", "paired", "fifo", "deadlock", "reduction", "memory",
        "update",
    }  # fmt: skip


def test_deadlock_of_crossed_ties_is_found() -> None:
    schedule = lower(build_schedule("gpipe", 2, 1, tied=((0, 1), (0, 1))))
    actions = [*schedule.actions[1][:-2], schedule.actions[1][-1], schedule.actions[1][-2]]
    (finding,) = schedule_findings(edited(schedule, 1, actions))
    assert (finding.rank, finding.position, finding.rule) == (1, len(actions) - 1, "reduction")


def test_the_old_name_of_schedule_findings_warns():
    with pytest.warns(DeprecationWarning, match="schedule_findings"):
        assert pipeline.check_schedule is schedule_findings


def test_a_forward_before_the_update_that_makes_its_weights_is_found() -> None:
    schedule = build_schedule("pipedream", 2, 1, num_steps=3)
    # Stage 0 is one update late, so that the forward of microbatch 2 needs update 0.
    order = "0F0 0F1 0F2 0B0 0UPDATE0 0B1 0UPDATE1 0B2 0UPDATE2"
    early = replace(edited(schedule, 0, [parse_action(text) for text in order.split()]), max_live=None)
    assert [str(finding.message) for finding in schedule_findings(early)] == [
        "0F2 uses the weights of 0UPDATE0, a later action"
    ]
    assert schedule_findings(schedule) == []
