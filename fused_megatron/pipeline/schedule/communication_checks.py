"""Checks of a lowered schedule: messages between ranks, deadlock, and reductions of gradients."""

from collections import defaultdict
from collections.abc import Iterator

from fused_megatron.pipeline.schedule.action import ENDS_OF_BACKWARD, RECEIVES, SENDS, Action, Kind, Schedule
from fused_megatron.pipeline.schedule.findings import Finding, Positions
from fused_megatron.pipeline.schedule.routing import Channel, channel_of, peer


def communication_findings(positions: Positions, sound: bool) -> list[Finding]:
    """Return breaches of the rules paired, fifo and reduction, and of deadlock if the compute actions are sound."""
    findings = [*_paired(positions), *_reductions(positions), *_tied(positions)]
    if sound and not findings:
        findings = [*_fifo(positions.schedule), *_deadlock(positions.schedule)]
    return findings


def _paired(positions: Positions) -> Iterator[Finding]:
    schedule, placement = positions.schedule, positions.schedule.placement
    wanted = set()
    for stage in range(positions.last_stage):
        if placement[stage] == placement[stage + 1]:
            continue
        for m in schedule.microbatches:
            for send, kinds in (
                (Action(stage, Kind.SEND_F, m), (Kind.FORWARD,)),
                (Action(stage + 1, Kind.SEND_B, m), (Kind.BACKWARD, Kind.INPUT_GRAD)),
            ):
                receive = peer(send)
                wanted |= {send, receive}
                made = [Action(send.stage, kind, m) for kind in kinds]
                used = [Action(receive.stage, kind, m) for kind in kinds]
                yield from _message_order(positions, send, made, after=True)
                yield from _message_order(positions, receive, used, after=False)
    for action, found in positions.of.items():
        if action.kind in SENDS or action.kind in RECEIVES:
            for rank, position in found[1:] if action in wanted else found:
                what = "appears twice" if action in wanted else "passes nothing between two ranks"
                yield Finding(rank, position, "paired", f"{action} {what}")


def _message_order(positions: Positions, action: Action, computes: list[Action], after: bool) -> Iterator[Finding]:
    """Check that a send is there, after its computation, or that a receive is there, before its computation."""
    if action not in positions.of:
        yield positions.missing("paired", action, *computes)
        return
    for rank, position in positions.of[action]:
        for compute in computes:
            found = positions.first(compute)
            if found and found[0] == rank and (found[1] > position) == after:
                yield Finding(rank, position, "paired", f"{action} comes {'before' if after else 'after'} {compute}")


def _fifo(schedule: Schedule) -> Iterator[Finding]:
    sent: defaultdict[Channel, list[Action]] = defaultdict(list)
    for actions in schedule.actions:
        for action in actions:
            if action.kind in SENDS:
                sent[channel_of(schedule, action)].append(action)
    received: defaultdict[Channel, int] = defaultdict(int)
    for rank, actions in enumerate(schedule.actions):
        for position, action in enumerate(actions):
            if action.kind in RECEIVES:
                channel = channel_of(schedule, action)
                send = sent[channel][received[channel]]
                received[channel] += 1
                if peer(send) != action:
                    yield Finding(rank, position, "fifo", f"{action} would receive the message of {send}")


def _deadlock(schedule: Schedule) -> Iterator[Finding]:
    """Simulate the lists without tags: a channel delivers in order; a tied reduction needs all its ranks at once."""
    position = [0] * schedule.num_ranks
    sent: defaultdict[Channel, int] = defaultdict(int)
    received: defaultdict[Channel, int] = defaultdict(int)
    arrived: defaultdict[int, set[int]] = defaultdict(set)
    members = {index: {schedule.placement[stage] for stage in group} for index, group in enumerate(schedule.tied)}
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                if action.kind in RECEIVES:
                    channel = channel_of(schedule, action)
                    if received[channel] == sent[channel]:
                        break
                    received[channel] += 1
                elif action.kind in SENDS:
                    sent[channel_of(schedule, action)] += 1
                elif action.kind == Kind.REDUCE_TIED:
                    group = action.tied_group
                    moved |= rank not in arrived[group]
                    arrived[group].add(rank)
                    if arrived[group] != members[group]:
                        break
                position[rank] += 1
                moved = True
    for rank, actions in enumerate(schedule.actions):
        if position[rank] < len(actions):
            yield Finding(rank, position[rank], "deadlock", f"{actions[position[rank]]} waits forever")


def _reductions(positions: Positions) -> Iterator[Finding]:
    """Check that each stage has a REDUCE_GRAD after its last backward, or, if steps overlap, before each update.

    There may be one after every backward (sharded gradients).
    """
    for stage in range(positions.last_stage + 1):
        pending = False
        reduction, where = Action(stage, Kind.REDUCE_GRAD), (positions.schedule.placement[stage], -1)
        for rank, position, action in positions.by_stage[stage]:
            where = (rank, position)
            if action.kind in ENDS_OF_BACKWARD:
                pending = True
            elif action.kind == Kind.REDUCE_GRAD:
                if not pending:
                    yield Finding(rank, position, "reduction", f"{action} has nothing to reduce")
                pending = False
            elif action.kind == Kind.UPDATE and pending:
                yield Finding(rank, position, "reduction", f"{action} comes before {reduction}")
        if pending:
            yield Finding(where[0], where[1], "reduction", f"{reduction} is missing")


def _tied(positions: Positions) -> Iterator[Finding]:
    schedule = positions.schedule
    wanted = set()
    for index, group in enumerate(schedule.tied):
        for rank in sorted({schedule.placement[stage] for stage in group}):
            own = [stage for stage in group if schedule.placement[stage] == rank]
            action = Action(min(own), Kind.REDUCE_TIED, index)
            wanted.add(action)
            if action not in positions.of:
                yield positions.missing("reduction", action)
                continue
            where = positions.of[action][0][1]
            for stage in own:
                later = [a for r, p, a in positions.by_stage[stage] if p > where and a.kind in ENDS_OF_BACKWARD]
                if later:
                    yield Finding(rank, where, "reduction", f"{action} comes before {later[0]}")
    for action, found in positions.of.items():
        if action.kind == Kind.REDUCE_TIED:
            for rank, position in found[1:] if action in wanted else found:
                yield Finding(rank, position, "reduction", f"{action} is one too many")
    for rank, actions in enumerate(schedule.actions):
        newest = -1
        for position, action in enumerate(actions):
            if action.kind == Kind.REDUCE_TIED:
                if action.tied_group < newest:
                    text = f"{action}: the groups must have the same order on all ranks, ascending"
                    yield Finding(rank, position, "reduction", text)
                newest = action.tied_group
