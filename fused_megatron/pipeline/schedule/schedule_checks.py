"""Checks of a schedule against the rules (findings.RULES); each breach has a rank, a position and a rule."""

from collections.abc import Iterator

from fused_megatron.pipeline.schedule.action import (
    COMPUTE,
    ENDS_OF_BACKWARD,
    KINDS,
    SYNCHRONOUS,
    WITHOUT_INDEX,
    Action,
    Kind,
    Schedule,
    live_activations,
    microbatches_of_update,
    updates_behind,
)
from fused_megatron.pipeline.schedule.communication_checks import communication_findings
from fused_megatron.pipeline.schedule.findings import Finding, Positions
from fused_megatron.pipeline.view.simulation import simulate


def schedule_findings(schedule: Schedule) -> list[Finding]:
    """Return every breach of the rules, ordered by rank and position; an empty list for a valid schedule.

    The rules about sends, receives and reductions apply to lowered schedules only.
    """
    if malformed := [*_malformed(schedule)]:
        return malformed
    positions = Positions(schedule)
    findings = [
        *_complete(positions),
        *_order(positions),
        *_placement(positions),
        *_ascending(positions),
        *_memory(schedule),
    ]
    findings += [*_sharding(schedule), *_updates(positions)]
    # These rules already report a rank that waits for a missing action, or for a later one of its own list.
    sound = not any(finding.rule in ("complete", "order", "placement") for finding in findings)
    if schedule.lowered:
        findings += communication_findings(positions, sound)
    elif sound:
        for rank, position in simulate(schedule).stuck:
            action = schedule.actions[rank][position]
            findings.append(Finding(rank, position, "deadlock", f"{action} waits forever"))
    return sorted(set(findings))


def _malformed(schedule: Schedule) -> Iterator[Finding]:
    """Find actions to which no rule applies: with an unknown kind, a missing index, or an index too many."""
    for rank, actions in enumerate(schedule.actions):
        for position, action in enumerate(actions):
            if action.kind not in KINDS:
                yield Finding(rank, position, "complete", f"{action} has an unknown kind ({', '.join(Kind)})")
            elif (action.index is None) != (action.kind in WITHOUT_INDEX):
                text = f"{action} has no index" if action.index is None else f"{action} must have no index"
                yield Finding(rank, position, "complete", text)


def _complete(positions: Positions) -> Iterator[Finding]:
    microbatches = positions.schedule.microbatches
    for action, found in positions.of.items():
        stage, kind, index = action
        known = 0 <= stage <= positions.last_stage and (kind not in COMPUTE or index in microbatches)
        for rank, position in found if not known else found[1:] if kind in COMPUTE else ():
            what = "appears twice" if known else "names no stage or microbatch of the schedule"
            yield Finding(rank, position, "complete", f"{action} {what}")
    for stage in range(positions.last_stage + 1):
        for microbatch in microbatches:
            yield from _complete_pair(positions, stage, microbatch)


def _complete_pair(positions: Positions, stage: int, microbatch: int) -> Iterator[Finding]:
    forward, whole, first, second = (Action(stage, kind, microbatch) for kind in COMPUTE)
    has_whole, has_first, has_second = (action in positions.of for action in (whole, first, second))
    if forward not in positions.of:
        yield positions.missing("complete", forward, whole, first)
    if has_whole:
        for extra in [a for a, there in ((first, has_first), (second, has_second)) if there]:
            yield Finding(*positions.of[extra][0], "complete", f"{extra} and {whole} do the same")
    elif not has_first and not has_second:
        yield positions.missing("complete", whole)
    elif not has_first:
        yield positions.missing("complete", first, second)
    elif not has_second:
        yield positions.missing("complete", second)


def _order(positions: Positions) -> Iterator[Finding]:
    for action, found in list(positions.of.items()):
        for needed in _needed(action):
            first = positions.first(needed)
            for rank, position in found:
                if first and first[0] == rank and first[1] > position:
                    yield Finding(rank, position, "order", f"{action} comes before {needed}, which it needs")


def _needed(action: Action) -> list[Action]:
    stage, kind, m = action
    if kind == Kind.FORWARD:
        return [Action(stage - 1, Kind.FORWARD, m)]
    if kind in (Kind.BACKWARD, Kind.INPUT_GRAD):
        next_backwards = [Action(stage + 1, kind, m) for kind in (Kind.BACKWARD, Kind.INPUT_GRAD)]
        return [Action(stage, Kind.FORWARD, m), *next_backwards]
    return [Action(stage, Kind.INPUT_GRAD, m)] if kind == Kind.WEIGHT_GRAD else []


def _placement(positions: Positions) -> Iterator[Finding]:
    for action, found in positions.of.items():
        if 0 <= action.stage <= positions.last_stage:
            owner = positions.schedule.placement[action.stage]
            for rank, position in found:
                if rank != owner:
                    yield Finding(rank, position, "placement", f"{action}: stage {action.stage} is on rank {owner}")


def _ascending(positions: Positions) -> Iterator[Finding]:
    # Linear layers sum weight gradients at W (or B); modules that cannot split their backward sum at I.
    for kinds in ((Kind.BACKWARD, Kind.INPUT_GRAD), (Kind.BACKWARD, Kind.WEIGHT_GRAD)):
        for found in positions.by_stage.values():
            newest: Action | None = None
            for rank, position, action in found:
                if action.kind in kinds:
                    if newest and action.microbatch < newest.microbatch:
                        yield Finding(rank, position, "ascending", f"{action} comes after {newest}")
                    newest = action


def _memory(schedule: Schedule) -> Iterator[Finding]:
    if schedule.max_live is not None:
        for rank, (actions, limit) in enumerate(zip(schedule.actions, schedule.max_live, strict=True)):
            for position, live in enumerate(live_activations(actions)):
                if live > limit:
                    yield Finding(rank, position, "memory", f"{actions[position]} is live activation {live} of {limit}")
                    break


def _sharding(schedule: Schedule) -> Iterator[Finding]:
    """Check that a stage with UNSHARD or RESHARD computes only between an UNSHARD and the next RESHARD."""
    for rank, actions in enumerate(schedule.actions):
        whole = {action.stage: False for action in actions if action.kind in (Kind.UNSHARD, Kind.RESHARD)}
        last: dict[int, int] = {}
        for position, action in enumerate(actions):
            if action.stage not in whole:
                continue
            if action.kind in (Kind.UNSHARD, Kind.RESHARD):
                if whole[action.stage] == (action.kind == Kind.UNSHARD):
                    state = "whole" if whole[action.stage] else "in shards"
                    other = Action(action.stage, Kind.RESHARD if whole[action.stage] else Kind.UNSHARD)
                    text = f"{action}: the stage is {state} already, without {other} before it"
                    yield Finding(rank, position, "sharding", text)
                whole[action.stage], last[action.stage] = action.kind == Kind.UNSHARD, position
            elif action.kind in COMPUTE and not whole[action.stage]:
                unshard = Action(action.stage, Kind.UNSHARD)
                text = f"{action}: the stage is in shards, without {unshard} before it"
                yield Finding(rank, position, "sharding", text)
        for stage in [stage for stage, is_whole in whole.items() if is_whole]:
            reshard = Action(stage, Kind.RESHARD)
            yield Finding(rank, last[stage], "sharding", f"{reshard} is missing: the stage stays whole")


def _updates(positions: Positions) -> Iterator[Finding]:
    schedule = positions.schedule
    per_update = microbatches_of_update(schedule)
    wanted = 0 if schedule.weights == SYNCHRONOUS else len(schedule.microbatches) // per_update
    for stage in range(schedule.num_stages):
        done, made = 0, set[int]()
        for rank, position, action in positions.by_stage[stage]:
            done += action.kind in ENDS_OF_BACKWARD
            if action.kind == Kind.FORWARD and schedule.weights != SYNCHRONOUS:
                version = action.microbatch // per_update - updates_behind(schedule, stage)
                if version > len(made):
                    text = f"{action} uses the weights of {Action(stage, Kind.UPDATE, version - 1)}, a later action"
                    yield Finding(rank, position, "update", text)
            if action.kind == Kind.UPDATE:
                number = action.update
                if number >= wanted or number in made:
                    yield Finding(rank, position, "update", f"{action} is one too many")
                elif done != (number + 1) * per_update:
                    text = f"{action} comes after {done} backwards of its stage, not {(number + 1) * per_update}"
                    yield Finding(rank, position, "update", text)
                made.add(number)
        for number in sorted(set(range(wanted)) - made):
            yield positions.missing("update", Action(stage, Kind.UPDATE, number))
