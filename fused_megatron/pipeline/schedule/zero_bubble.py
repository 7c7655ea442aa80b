"""Schedules that split the backward (I: gradient of the input, W: of the weights) and fill the bubble with W.

Each is a pure function to lists of actions for each rank. Papers: Qi et al., "Zero Bubble Pipeline Parallelism" (arXiv
2401.10241) and "Pipeline Parallelism with Controllable Memory" (2405.15362); DualPipeV is half of the DualPipe of
DeepSeek-V3 (2412.19437).
"""

from collections import Counter, deque

from fused_megatron.pipeline.schedule.action import Action, Kind

Actions = list[Action]


class _TwoStages:
    """Rank of a V placement while its list is built: two stages, and the next microbatch of each kind of action.

    Local stage 0 comes first in the model, local stage 1 is its counterpart on the way back.
    """

    def __init__(self, num_ranks: int, rank: int) -> None:
        self.stages = (rank, 2 * num_ranks - 1 - rank)
        self.actions: Actions = []
        self.counts: Counter[tuple[int, Kind]] = Counter()
        self.deferred: deque[int] = deque()

    def add(self, local_stage: int, *kinds: Kind) -> None:
        """Append actions of these kinds, each for the next microbatch of the stage."""
        for kind in kinds:
            # B counts as an I and a W.
            counted = (Kind.INPUT_GRAD, Kind.WEIGHT_GRAD) if kind == Kind.BACKWARD else (kind,)
            self.actions.append(Action(self.stages[local_stage], kind, self.counts[local_stage, counted[0]]))
            self.counts.update((local_stage, each) for each in counted)

    def backward(self, local_stage: int, defer: bool) -> None:
        """Append B, or, with defer, I and leave W to weight_grad()."""
        self.add(local_stage, Kind.INPUT_GRAD if defer else Kind.BACKWARD)
        if defer:
            self.deferred.append(local_stage)

    def weight_grad(self) -> None:
        """Append the W that was deferred first."""
        if self.deferred:
            self.add(self.deferred.popleft(), Kind.WEIGHT_GRAD)

    def of_microbatches(self, count: int) -> Actions:
        return [action for action in self.actions if action.microbatch < count]


def zb_v(num_ranks: int, num_microbatches: int) -> list[Actions]:
    """ZB-V: no rank idles between its first and its last action if F, I and W take the same time."""
    # With fewer than 2p - 1 microbatches the pattern for 2p - 1 is used, without the missing ones.
    padded = max(num_microbatches, 2 * num_ranks - 1)
    return [_zb_v_rank(num_ranks, rank, padded).of_microbatches(num_microbatches) for rank in range(num_ranks)]


def _zb_v_rank(num_ranks: int, rank: int, num_microbatches: int) -> _TwoStages:
    state = _TwoStages(num_ranks, rank)
    for _ in range(2 * (num_ranks - rank) - 1):
        state.add(0, Kind.FORWARD)
    for _ in range(rank):
        state.add(1, Kind.FORWARD)
        state.add(0, Kind.FORWARD)
    for _ in range(num_ranks - rank):
        state.add(1, Kind.FORWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD)
    while state.counts[1, Kind.FORWARD] < num_microbatches:
        if state.counts[0, Kind.FORWARD] < num_microbatches:
            state.add(0, Kind.FORWARD)
        state.add(0, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD)
        state.add(1, Kind.FORWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD)
    for _ in range(rank):
        state.add(0, Kind.INPUT_GRAD)
        state.add(1, Kind.INPUT_GRAD)
    for _ in range(num_ranks - rank):
        state.add(0, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD)
    for local_stage in (1, 0):
        while state.counts[local_stage, Kind.WEIGHT_GRAD] < num_microbatches:
            state.add(local_stage, Kind.WEIGHT_GRAD)
    return state


def dual_pipe_v(num_ranks: int, num_microbatches: int) -> list[Actions]:
    """DualPipeV: each F of one stage of a rank is beside a B of the other, and each hides the messages of the other."""
    padded = max(num_microbatches, 2 * num_ranks)
    return [_dual_pipe_v_rank(num_ranks, rank, padded).of_microbatches(num_microbatches) for rank in range(num_ranks)]


def _dual_pipe_v_rank(num_ranks: int, rank: int, num_microbatches: int) -> _TwoStages:
    state, later = _TwoStages(num_ranks, rank), num_ranks - 1 - rank
    for _ in range(2 * later):
        state.add(0, Kind.FORWARD)
    for _ in range(rank + 1):
        state.add(0, Kind.FORWARD)
        state.add(1, Kind.FORWARD)
    for _ in range(later):
        state.add(1, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD, Kind.FORWARD)
    for _ in range(num_microbatches - num_ranks - later):
        state.add(0, Kind.FORWARD)
        state.add(1, Kind.BACKWARD, Kind.FORWARD)
        state.add(0, Kind.BACKWARD)
    for _ in range(later):
        state.add(1, Kind.BACKWARD, Kind.FORWARD)
        state.add(0, Kind.BACKWARD)
    # The second half of the last 2 (rank + 1) backwards defers W, to fill the bubble at the end.
    for step in range(2 * (rank + 1)):
        state.backward(1 - step % 2, defer=step > rank)
    for _ in range(later):
        state.weight_grad()
        state.backward(0, defer=True)
    while state.deferred:
        state.weight_grad()
    return state


def v_half(num_ranks: int, num_microbatches: int) -> list[Actions]:
    """V-Half: half the activations of 1F1B, equal on all ranks, and two thirds of its bubble.

    F and I follow a pattern that repeats every six units, in which a microbatch passes through the V without waiting. W
    fills the free units. The pattern assumes equal times of F, I and W.
    """
    limit = v_half_limit(num_ranks)
    orders = [deque(order) for order in _v_half_orders(num_ranks, num_microbatches)]
    lists: list[Actions] = [[] for _ in orders]
    deferred: list[deque[Action]] = [deque() for _ in orders]
    live, done, now = [0] * num_ranks, dict[Action, int](), 0
    while any(orders) or any(deferred):
        begun = []
        for rank, order in enumerate(orders):
            action = None
            if order and _v_half_may_begin(order[0], num_ranks, done, now, live[rank] < limit):
                action = order.popleft()
            elif deferred[rank]:
                action = deferred[rank].popleft()
            if action is not None:
                begun.append(action)
                lists[rank].append(action)
                live[rank] += (action.kind == Kind.FORWARD) - (action.kind == Kind.WEIGHT_GRAD)
                if action.kind == Kind.INPUT_GRAD:
                    deferred[rank].append(action._replace(kind=Kind.WEIGHT_GRAD))
        now += 1
        done.update({action: now for action in begun})
        assert begun or now < 2 * num_ranks, "the pattern stops"
    return lists


def v_half_limit(num_ranks: int) -> int:
    """Return the most activations of one stage that V-Half keeps on a rank.

    For p ranks it is p, rounded up to an even number (as many as p / 2 activations of both stages), and at least 4 for
    p > 1.
    """
    return max(2, num_ranks + num_ranks % 2, 4 if num_ranks > 1 else 0)


def _v_half_orders(num_ranks: int, num_microbatches: int) -> list[Actions]:
    """Return the F and I of each rank in the order of the pattern."""
    taken: list[set[int]] = [set() for _ in range(num_ranks)]
    begins: list[list[tuple[int, int, Kind]]] = [[] for _ in range(num_ranks)]
    last, time = 2 * num_ranks - 1, -1
    way = [(stage, Kind.FORWARD) for stage in range(last + 1)]
    way += [(stage, Kind.INPUT_GRAD) for stage in range(last, -1, -1)]
    for stage, kind in way:
        rank, time = min(stage, last - stage), time + 1
        while time % _PATTERN in taken[rank]:
            time += 1
        taken[rank].add(time % _PATTERN)
        begins[rank].append((time, stage, kind))
    return [
        [
            Action(stage, kind, microbatch)
            for _, microbatch, stage, kind in sorted(
                (time + _PATTERN * m, m, stage, kind)
                for time, stage, kind in begins[rank]
                for m in range(num_microbatches)
            )
        ]
        for rank in range(num_ranks)
    ]


# Length of the pattern: F, I and W of two stages.
_PATTERN = 6


def _v_half_may_begin(action: Action, num_ranks: int, done: dict[Action, int], now: int, room: bool) -> bool:
    """Whether the action's input is done by now, and, for F, whether there is room for one more activation."""
    stage, kind, microbatch = action
    if kind == Kind.FORWARD:
        return room and (stage == 0 or done.get(Action(stage - 1, Kind.FORWARD, microbatch), now + 1) <= now)
    last = stage == 2 * num_ranks - 1
    needs = Action(stage, Kind.FORWARD, microbatch) if last else Action(stage + 1, Kind.INPUT_GRAD, microbatch)
    return done.get(needs, now + 1) <= now
