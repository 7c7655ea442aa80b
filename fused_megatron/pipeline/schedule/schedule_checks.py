"""Checks of a schedule against the rules (findings.RULES). A breach names rank, position and rule."""

from collections.abc import Iterator

from fused_megatron.pipeline.schedule.action import (
    COMPUTE,
    ENDS_OF_BACKWARD,
    KINDS,
    STASHED,
    SYNCHRONOUS,
    WITHOUT_INDEX,
    Action,
    Kind,
    Schedule,
    live_activations,
)
from fused_megatron.pipeline.schedule.communication_checks import communication_findings
from fused_megatron.pipeline.schedule.findings import Finding, Places
from fused_megatron.pipeline.view.simulation import simulate


def schedule_findings(schedule: Schedule) -> list[Finding]:
    """Every breach of the rules, by rank and position; the empty list for a good schedule.

    Before lowering the rules about sends, receives and reductions are left out.
    """
    if malformed := [*_malformed(schedule)]:
        return malformed
    places = Places(schedule)
    findings = [*_complete(places), *_order(places), *_placement(places), *_ascending(places), *_memory(schedule)]
    findings += [*_sharding(schedule), *_updates(places)]
    # A rank that waits for what is nowhere, or comes too late on its own rank, is named by these already.
    sound = not any(finding.rule in ("complete", "order", "placement") for finding in findings)
    if schedule.lowered:
        findings += communication_findings(places, sound)
    elif sound:
        for rank, position in simulate(schedule).stuck:
            action = schedule.actions[rank][position]
            findings.append(Finding(rank, position, "deadlock", f"{action} waits for ever"))
    return sorted(set(findings))


def _malformed(schedule: Schedule) -> Iterator[Finding]:
    """Actions that no rule can speak of: of no kind, or with an index where their kind has none, or without."""
    for rank, actions in enumerate(schedule.actions):
        for position, action in enumerate(actions):
            if action.kind not in KINDS:
                yield Finding(rank, position, "complete", f"{action} is of no kind ({', '.join(Kind)})")
            elif (action.index is None) != (action.kind in WITHOUT_INDEX):
                text = f"{action} has no index" if action.index is None else f"{action} must have no index"
                yield Finding(rank, position, "complete", text)


def _complete(places: Places) -> Iterator[Finding]:
    microbatches = places.schedule.microbatches
    for action, found in places.of.items():
        stage, kind, index = action
        known = 0 <= stage <= places.last_stage and (kind not in COMPUTE or index in microbatches)
        for rank, position in found if not known else found[1:] if kind in COMPUTE else ():
            what = "is there twice" if known else "is of no stage or microbatch of the schedule"
            yield Finding(rank, position, "complete", f"{action} {what}")
    for stage in range(places.last_stage + 1):
        for microbatch in microbatches:
            yield from _complete_pair(places, stage, microbatch)


def _complete_pair(places: Places, stage: int, microbatch: int) -> Iterator[Finding]:
    forward, whole, first, second = (Action(stage, kind, microbatch) for kind in COMPUTE)
    has_whole, has_first, has_second = (action in places.of for action in (whole, first, second))
    if forward not in places.of:
        yield places.missing("complete", forward, whole, first)
    if has_whole:
        for extra in [a for a, there in ((first, has_first), (second, has_second)) if there]:
            yield Finding(*places.of[extra][0], "complete", f"{extra} and {whole} do the same")
    elif not has_first and not has_second:
        yield places.missing("complete", whole)
    elif not has_first:
        yield places.missing("complete", first, second)
    elif not has_second:
        yield places.missing("complete", second)


def _order(places: Places) -> Iterator[Finding]:
    for action, found in list(places.of.items()):
        for needed in _needed(action):
            there = places.first(needed)
            for rank, position in found:
                if there and there[0] == rank and there[1] > position:
                    yield Finding(rank, position, "order", f"{action} stands before {needed}, which it needs")


def _needed(action: Action) -> list[Action]:
    stage, kind, m = action
    if kind == Kind.FORWARD:
        return [Action(stage - 1, Kind.FORWARD, m)]
    if kind in (Kind.BACKWARD, Kind.INPUT_GRAD):
        next_backwards = [Action(stage + 1, kind, m) for kind in (Kind.BACKWARD, Kind.INPUT_GRAD)]
        return [Action(stage, Kind.FORWARD, m), *next_backwards]
    return [Action(stage, Kind.INPUT_GRAD, m)] if kind == Kind.WEIGHT_GRAD else []


def _placement(places: Places) -> Iterator[Finding]:
    for action, found in places.of.items():
        if 0 <= action.stage <= places.last_stage:
            owner = places.schedule.placement[action.stage]
            for rank, position in found:
                if rank != owner:
                    yield Finding(rank, position, "placement", f"{action}: stage {action.stage} is on rank {owner}")


def _ascending(places: Places) -> Iterator[Finding]:
    # Linears sum weight gradients at W (or B); modules that cannot split do so at I.
    for kinds in ((Kind.BACKWARD, Kind.INPUT_GRAD), (Kind.BACKWARD, Kind.WEIGHT_GRAD)):
        for found in places.by_stage.values():
            newest: Action | None = None
            for rank, position, action in found:
                if action.kind in kinds:
                    if newest and action.microbatch < newest.microbatch:
                        yield Finding(rank, position, "ascending", f"{action} stands behind {newest}")
                    newest = action


def _memory(schedule: Schedule) -> Iterator[Finding]:
    if schedule.max_live is not None:
        for rank, (actions, limit) in enumerate(zip(schedule.actions, schedule.max_live, strict=True)):
            for position, live in enumerate(live_activations(actions)):
                if live > limit:
                    yield Finding(rank, position, "memory", f"{actions[position]} is live activation {live} of {limit}")
                    break


def _sharding(schedule: Schedule) -> Iterator[Finding]:
    """A stage that has UNSHARD or RESHARD is whole from each UNSHARD to the next RESHARD, and computes only there."""
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
                    text = f"{action}: the stage is {state} already, no {other} stands before it"
                    yield Finding(rank, position, "sharding", text)
                whole[action.stage], last[action.stage] = action.kind == Kind.UNSHARD, position
            elif action.kind in COMPUTE and not whole[action.stage]:
                unshard = Action(action.stage, Kind.UNSHARD)
                text = f"{action}: the stage is in shards, no {unshard} stands before it"
                yield Finding(rank, position, "sharding", text)
        for stage in [stage for stage, is_whole in whole.items() if is_whole]:
            reshard = Action(stage, Kind.RESHARD)
            yield Finding(rank, last[stage], "sharding", f"{reshard} is missing: the stage stays whole")


def _updates(places: Places) -> Iterator[Finding]:
    schedule = places.schedule
    per_update = 1 if schedule.weights == STASHED else schedule.num_microbatches
    wanted = 0 if schedule.weights == SYNCHRONOUS else len(schedule.microbatches) // per_update
    for stage in range(schedule.num_stages):
        done, made = 0, set[int]()
        for rank, position, action in places.by_stage[stage]:
            done += action.kind in ENDS_OF_BACKWARD
            if action.kind == Kind.UPDATE:
                number = action.update
                if number >= wanted or number in made:
                    yield Finding(rank, position, "update", f"{action} is one too many")
                elif done != (number + 1) * per_update:
                    behind = f"stands behind {done} backwards of its stage, not {(number + 1) * per_update}"
                    yield Finding(rank, position, "update", f"{action} {behind}")
                made.add(number)
        for number in sorted(set(range(wanted)) - made):
            yield places.missing("update", Action(stage, Kind.UPDATE, number))
