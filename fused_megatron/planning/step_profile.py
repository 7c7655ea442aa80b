"""Profile of a rank's actions: memory, computation and transfers of each, recorded in a step of few microbatches."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch

from fused_megatron.assembly.assemble import Assembly
from fused_megatron.mesh import coordinates
from fused_megatron.observe.storages import Event, Storage
from fused_megatron.pipeline.run.action_loop import receives_ahead
from fused_megatron.pipeline.schedule.action import COMPUTE, OF_MICROBATCH, Action, Kind
from fused_megatron.planning.recorded_step import ASSEMBLY, BATCH, MODEL, STEP, UPDATED, RecordedStep
from fused_megatron.planning.step_recorder import GATHERED_ROWS, HEADER, LOSS_LAYER, RECEIVED, REDUCED_ROWS, Place, Work

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer state"
ACTIVATIONS, MESSAGES, GATHERED = "activations", "messages", "gathered weights"
LOSS, WORKSPACE, OTHER = "loss", "workspace", "batch and buffers"
KINDS = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, MESSAGES, GATHERED, LOSS, WORKSPACE, OTHER)
"""Kinds of memory, in the order of a report."""

DEFERRED = "weight gradients put off"
"""Layer of the memory that an INPUT_GRAD keeps for its WEIGHT_GRAD."""

# Number of computations by which a receive is posted before its use, as in PipelineExecutor.
_LOOKAHEAD = 1


class Memory(NamedTuple):
    """A kind of memory, and its layer ("" for kinds without a layer)."""

    kind: str
    layer: str = ""


@dataclass
class Profile:
    """Memory and work of one action, or of the part of a step before or after all actions.

    Attributes:
        delta: growth of the held bytes from before it to after it, without received messages.
        peak: largest growth of the held bytes at any moment of it.
        at_peak: growth by kind of memory at that moment.
        work: computation and transfers.
    """

    delta: Counter[Memory] = field(default_factory=Counter)
    peak: int = 0
    at_peak: Counter[Memory] = field(default_factory=Counter)
    work: Counter[Work] = field(default_factory=Counter)


class ActionKey(NamedTuple):
    """Key of all actions that do the same.

    Attributes:
        stage, kind: stage and kind of the actions.
        microbatch: the recorded microbatch that stands for them; None for kinds without a microbatch.
    """

    stage: int
    kind: Kind
    microbatch: int | None = None


@dataclass(frozen=True)
class StepProfile:
    """Profiles of all actions of a rank in a step; every microbatch does the same as the recorded one.

    Attributes:
        start: bytes held before the step, by kind of memory.
        before: profile of the step before its first action.
        actions: profile of each key.
        num_recorded: number of microbatches that were run.
        num_microbatches: number of microbatches of the profiled step.
        after: profile of the step after its last action: the norm, the sums over the ranks, the update.
        received: bytes of a message.
        once: work that a step does once for any number of microbatches: the sums of gradients, the norm.
        losses: bytes that the losses of the microbatches that were not run add after the step.
    """

    start: Counter[Memory]
    before: Profile
    actions: Mapping[ActionKey, Profile]
    num_recorded: int
    num_microbatches: int
    after: Profile
    received: int
    once: Counter[Work]
    losses: int

    def key_of(self, action: Action) -> ActionKey:
        """Return the key of an action of any microbatch."""
        return key_of(action, self.num_recorded, self.num_microbatches)

    def of(self, action: Action) -> Profile:
        """Return the profile of an action of any microbatch."""
        return self.actions.get(self.key_of(action), Profile())


class StepMemory(NamedTuple):
    """Memory over a step.

    Attributes:
        peak: bytes at the peak, by kind of memory.
        at: position and action of the peak; None if it is outside of all actions.
        held_bytes: bytes held after the step.
    """

    peak: Counter[Memory]
    at: tuple[int, Action] | None
    held_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Return the bytes of all kinds at the peak."""
        return sum(self.peak.values())


def recorded_memory(step: RecordedStep, actions: Sequence[Action]) -> StepMemory:
    """Return the memory over a recorded step of all microbatches, as the recorder saw it.

    Args:
        step: the recorded step.
        actions: the rank's lowered actions; an action that occurs several times counts as its first occurrence.
    """
    kinds, peak = _kinds(step), step.recorder.storages.peak(step.assembled)
    held: Counter[Memory] = Counter()
    for storage in peak.storages:
        held[kinds[storage]] += storage.num_bytes
    action = peak.where.action
    at = (list(actions).index(action), action) if action in actions else None
    return StepMemory(held, at, step.held_bytes)


def key_of(action: Action, num_recorded: int, num_microbatches: int) -> ActionKey:
    """Return the key of an action, if fewer microbatches were run: the first and the last stand for themselves."""
    if action.kind not in OF_MICROBATCH:
        return ActionKey(action.stage, action.kind)
    is_last = action.microbatch == num_microbatches - 1
    usual = min(action.microbatch, max(0, num_recorded - 2))
    return ActionKey(action.stage, action.kind, num_recorded - 1 if is_last else usual)


def profile_of(step: RecordedStep, num_microbatches: int) -> StepProfile:
    """Compute the profile of a rank from a step of a few microbatches.

    Args:
        step: the recorded step of the rank.
        num_microbatches: number of microbatches of the profiled step, whose whole batch is in memory from the start.
    """
    kinds = _kinds(step)
    recorded = len(step.assembly.executor.schedule.microbatches)
    for storage in kinds:
        if storage.made.phase == BATCH:
            storage.num_bytes = storage.num_bytes // recorded * num_microbatches
    events = [event for event in step.recorder.storages.events() if event.storage.made.layer != HEADER]
    assembled = [event for event in events if event.where.phase in (MODEL, ASSEMBLY, UPDATED)]
    rest = events[len(assembled) :]
    start: Counter[Memory] = Counter()
    for event in assembled:
        start[kinds[event.storage]] += event.storage.num_bytes if event.comes else -event.storage.num_bytes
    parts = [(action, list(group)) for action, group in groupby(rest, key=lambda event: event.where.action)]
    inside = [index for index, (action, _) in enumerate(parts) if action is not None]
    first, last = (inside[0], inside[-1]) if inside else (len(parts), len(parts) - 1)
    before = _profile((event for _, group in parts[:first] for event in group), kinds)
    after = _profile((event for _, group in parts[last + 1 :] for event in group), kinds)
    actions: dict[ActionKey, Profile] = {}
    received = 0
    for action, group in parts[first : last + 1]:
        assert action is not None, "between two actions nothing is made"
        received = max([received, *(e.storage.num_bytes for e in group if _is_received(e))])
        actions[key_of(action, recorded, recorded)] = _profile(
            (event for event in group if not _is_received(event)), kinds
        )
    once, reductions = Counter[Work](), Counter[Work]()
    # Every microbatch reduces sharded gradients and gathers sharded weights.
    every_microbatch = step.assembly.plan.reduce_each_microbatch
    for (phase, action), work in step.recorder.work.items():
        if phase != STEP:
            continue
        again = action is not None and action.kind in OF_MICROBATCH
        for done, number in work.items():
            # Without sharded gradients a step does this once: sums in the last backward, weights in the first forward.
            over_replicas = done.of_replicas
            if action is not None and again and done.kind != "receive" and (every_microbatch or not over_replicas):
                actions.setdefault(key_of(action, recorded, recorded), Profile()).work.setdefault(done, number)
            elif every_microbatch and over_replicas and action is not None:
                reductions[done] += number
            else:
                once[done] += number
    for done, number in reductions.items():
        once[done] += number // recorded * num_microbatches
    for done in once:
        # Receives are posted in actions of other microbatches; losses have 8 bytes each.
        if done.kind == "receive" or (done.kind == "broadcast" and done.what == "bytes"):
            once[done] = once[done] // recorded * num_microbatches
    last_stage = step.assembly.plan.num_stages - 1 in step.assembly.model.stages
    losses = 0 if last_stage else 8 * (num_microbatches - recorded)
    return StepProfile(+start, before, actions, recorded, num_microbatches, after, received, once, losses)


class Transfers(NamedTuple):
    """Number of transfers of one kind over one axis, and bytes of their whole tensors, as in record_communication."""

    calls: int
    num_bytes: int


def transfers_of(
    work: Mapping[Work, int], sizes: Mapping[str, int], expert_sizes: Mapping[str, int]
) -> dict[tuple[str, str], Transfers]:
    """Sum the transfers in a count of work, by kind ("all_reduce", "send", ..) and axes, as axes_of returns them.

    Transfers of experts have the axes of the second grid.
    """
    found: dict[tuple[str, str], Transfers] = {}
    for done, number in work.items():
        if done.group:
            key = done.kind, axes_of(done.group, expert_sizes if done.of_experts else sizes)
            calls, num_bytes = found.get(key, Transfers(0, 0))
            is_count = done.what == "calls"
            found[key] = Transfers(calls + number * is_count, num_bytes + number * (not is_count))
    return found


def axes_of(ranks: Sequence[int], sizes: Mapping[str, int]) -> str:
    """Return the axes of a grid along which the ranks of a group differ: "tp", "dp" or "ep", or several, as "dp+cp"."""
    found = [coordinates(rank, sizes) for rank in ranks]
    axes = ("tp", "pp", "dp", "cp", "edp", "ep", "etp")
    return "+".join(axis for axis in axes if axis in sizes and len({each[axis] for each in found}) > 1)


def _is_received(event: Event) -> bool:
    return event.comes and event.storage.made.layer == RECEIVED


def walk(profile: StepProfile, actions: Sequence[Action]) -> StepMemory:
    """Compute the memory over a step in which the executor runs these actions one after the other.

    Args:
        profile: the profile of the rank.
        actions: the rank's lowered actions, for any number of microbatches.
    """
    posts = [len(receives) for receives in receives_ahead(actions, _LOOKAHEAD)]
    held = sum(profile.start.values())
    most, at = held + profile.before.peak, -1
    held += sum(profile.before.delta.values())
    for position, action in enumerate(actions):
        done = profile.of(action)
        held += posts[position] * profile.received
        if held + done.peak > most:
            most, at = held + done.peak, position
        held += _total(done)
    if held + profile.after.peak > most:
        most, at = held + profile.after.peak, len(actions)
    held += _total(profile.after) + profile.losses
    peak = _held_at(profile, actions, posts, at)
    assert sum(peak.values()) == most
    return StepMemory(peak, (at, actions[at]) if 0 <= at < len(actions) else None, held)


def work_of(profile: StepProfile, actions: Sequence[Action]) -> Counter[Work]:
    """Count the computation and the transfers of a step of these actions; arguments as walk."""
    total = Counter(profile.once)
    for key, count in Counter(profile.key_of(action) for action in actions).items():
        for work, number in profile.actions.get(key, Profile()).work.items():
            total[work] += count * number
    return total


def _total(profile: Profile) -> int:
    return sum(profile.delta.values())


def _held_at(profile: StepProfile, actions: Sequence[Action], posts: Sequence[int], at: int) -> Counter[Memory]:
    """Return the bytes by kind at the peak of the action at a position: -1 before all, len(actions) after all."""
    held = Counter(profile.start)
    if at < 0:
        return _plus(held, profile.before.at_peak)
    held = _plus(held, profile.before.delta)
    held[Memory(MESSAGES)] += profile.received * sum(posts[: at + 1])
    for key, count in Counter(profile.key_of(action) for action in actions[:at]).items():
        held = _plus(held, profile.actions.get(key, Profile()).delta, count)
    if at == len(actions):
        return _plus(held, profile.after.at_peak)
    return _plus(held, profile.of(actions[at]).at_peak)


def _plus(some: Counter[Memory], more: Mapping[Memory, int], times: int = 1) -> Counter[Memory]:
    total = Counter(some)
    for memory, num_bytes in more.items():
        total[memory] += times * num_bytes
    return Counter({memory: num_bytes for memory, num_bytes in total.items() if num_bytes})


def _profile(events: Iterator[Event], kinds: Mapping[Storage[Any], Memory]) -> Profile:
    held, peak, now = 0, 0, Counter[Memory]()
    at_peak: Counter[Memory] = Counter()
    for event in events:
        sign = 1 if event.comes else -1
        held += sign * event.storage.num_bytes
        now[kinds[event.storage]] += sign * event.storage.num_bytes
        if held > peak:
            peak, at_peak = held, Counter(now)
    return Profile(Counter({m: n for m, n in now.items() if n}), peak, Counter({m: n for m, n in at_peak.items() if n}))


def _kinds(step: RecordedStep) -> dict[Storage[Any], Memory]:
    """Return the kind of each storage: by the part of the assembly that owns it, else by where it came and went."""
    storages = step.recorder.storages
    kinds: dict[Storage[Any], Memory] = {}
    for kind, tensors in _parts_of(step.assembly):
        for tensor in tensors:
            storage = storages.of(tensor)
            if storage is not None:
                kinds.setdefault(storage, Memory(kind))
    return {storage: kinds.get(storage) or _kind(storage) for storage in storages.storages()}


def _parts_of(assembly: Assembly) -> Iterator[tuple[str, list[torch.Tensor]]]:
    yield WEIGHTS, [*assembly.own_weights.values(), *assembly.parameters.values()]
    yield GRADIENTS, list(assembly.gradients.by_name(assembly.parameters).values())
    yield OPTIMIZER, [tensor for state in assembly.optimizer.state().values() for tensor in state.values()]


def _kind(storage: Storage[Place]) -> Memory:
    made = storage.made
    if made.layer == GATHERED_ROWS:
        return Memory(GATHERED)
    if made.layer == REDUCED_ROWS:
        return Memory(GRADIENTS)
    if made.phase == ASSEMBLY:  # _kinds has found all other tensors of the assembly; this is a count of updates
        return Memory(OPTIMIZER)
    if made.phase == BATCH or made.action is None:
        return Memory(OTHER)
    if made.layer == LOSS_LAYER:
        return Memory(LOSS)
    if made.layer == RECEIVED:
        return Memory(MESSAGES)
    kept = storage.freed is None or storage.freed.action != made.action
    if made.action.kind not in COMPUTE or (not made.layer and kept and made.action.kind == Kind.FORWARD):
        return Memory(MESSAGES if made.action.kind in (Kind.FORWARD, Kind.SEND_F, Kind.SEND_B) else WORKSPACE)
    if not kept:
        return Memory(WORKSPACE)
    if made.action.kind == Kind.FORWARD:
        return Memory(ACTIVATIONS, made.layer)
    freed_by = None if storage.freed is None else storage.freed.action
    if freed_by is not None and freed_by.kind == Kind.WEIGHT_GRAD:
        return Memory(ACTIVATIONS, DEFERRED)
    return Memory(MESSAGES)
