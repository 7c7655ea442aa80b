"""Schedules that split the backward (I: gradient of the input, W: of the weights) and fill the bubble with W.

Each is a pure function to per-rank lists. Papers: Qi et al., "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241) and
"Pipeline Parallelism with Controllable Memory" (2405.15362); DualPipeV: DeepSeek-V3 (2412.19437), cut in half.
"""

from collections import Counter, deque

from fused_megatron.pipeline.schedule.action import Action, Kind

Actions = list[Action]


class _TwoStages:
    """A rank of a V: its stage on the way down (leg 0) and on the way up (leg 1), each with its next microbatches."""

    def __init__(self, num_ranks: int, rank: int) -> None:
        self.stages = (rank, 2 * num_ranks - 1 - rank)
        self.actions: Actions = []
        self.counts: Counter[tuple[int, Kind]] = Counter()
        self.put_off: deque[int] = deque()

    def add(self, leg: int, *kinds: Kind) -> None:
        """Each for the stage's next microbatch."""
        for kind in kinds:
            # B is an I and a W in one.
            counted = (Kind.INPUT_GRAD, Kind.WEIGHT_GRAD) if kind == Kind.BACKWARD else (kind,)
            self.actions.append(Action(self.stages[leg], kind, self.counts[leg, counted[0]]))
            self.counts.update((leg, each) for each in counted)

    def backward(self, leg: int, put_off: bool) -> None:
        """B, or I with W put off."""
        self.add(leg, Kind.INPUT_GRAD if put_off else Kind.BACKWARD)
        if put_off:
            self.put_off.append(leg)

    def weight_grad(self) -> None:
        """The W that was put off first."""
        if self.put_off:
            self.add(self.put_off.popleft(), Kind.WEIGHT_GRAD)

    def of_microbatches(self, count: int) -> Actions:
        return [action for action in self.actions if action.microbatch < count]


def zb_v(num_ranks: int, num_microbatches: int) -> list[Actions]:
    """ZB-V: between its first and its last action no rank idles where F, I and W take the same time."""
    # With fewer microbatches the pattern of 2p - 1 is kept, and what is not there is left out.
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
    for leg in (1, 0):
        while state.counts[leg, Kind.WEIGHT_GRAD] < num_microbatches:
            state.add(leg, Kind.WEIGHT_GRAD)
    return state


def dual_pipe_v(num_ranks: int, num_microbatches: int) -> list[Actions]:
    """DualPipeV: pairs of F and B of the two stages of a rank stand side by side, so that one can hide the other's
    communication."""
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
    # Of the last 2 (rank + 1) backwards the later half puts W off, to fill the way out.
    for step in range(2 * (rank + 1)):
        state.backward(1 - step % 2, put_off=step > rank)
    for _ in range(later):
        state.weight_grad()
        state.backward(0, put_off=True)
    while state.put_off:
        state.weight_grad()
    return state


def v_half(num_ranks: int, num_microbatches: int) -> list[Actions]:
    """V-Half: half the activations of 1F1B, on every rank alike, for two thirds of its bubble.

    F and I follow a pattern that repeats every six units, in which a microbatch passes through the V without a stop; W
    fills what is left. The pattern is made for F, I and W of equal time.
    """
    limit = v_half_limit(num_ranks)
    orders = [deque(order) for order in _v_half_orders(num_ranks, num_microbatches)]
    lists: list[Actions] = [[] for _ in orders]
    put_off: list[deque[Action]] = [deque() for _ in orders]
    live, done, now = [0] * num_ranks, dict[Action, int](), 0
    while any(orders) or any(put_off):
        begun = []
        for rank, order in enumerate(orders):
            action = None
            if order and _v_half_may_begin(order[0], num_ranks, done, now, live[rank] < limit):
                action = order.popleft()
            elif put_off[rank]:
                action = put_off[rank].popleft()
            if action is not None:
                begun.append(action)
                lists[rank].append(action)
                live[rank] += (action.kind == Kind.FORWARD) - (action.kind == Kind.WEIGHT_GRAD)
                if action.kind == Kind.INPUT_GRAD:
                    put_off[rank].append(action._replace(kind=Kind.WEIGHT_GRAD))
        now += 1
        done.update({action: now for action in begun})
        assert begun or now < 2 * num_ranks, "the pattern stops"
    return lists


def v_half_limit(num_ranks: int) -> int:
    """The activations of one stage that V-Half keeps on a rank, at most: an even number of about p (that is p / 2 of
    the model's p parts), and 4 where p is 2."""
    return max(2, num_ranks + num_ranks % 2, 4 if num_ranks > 1 else 0)


def _v_half_orders(num_ranks: int, num_microbatches: int) -> list[Actions]:
    """F and I of each rank in the order of the pattern."""
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


# F, I and W of two stages.
_PATTERN = 6


def _v_half_may_begin(action: Action, num_ranks: int, done: dict[Action, int], now: int, room: bool) -> bool:
    """Whether what it needs is there by now, and for F, whether one more activation may be kept."""
    stage, kind, microbatch = action
    if kind == Kind.FORWARD:
        return room and (stage == 0 or done.get(Action(stage - 1, Kind.FORWARD, microbatch), now + 1) <= now)
    last = stage == 2 * num_ranks - 1
    needs = Action(stage, Kind.FORWARD, microbatch) if last else Action(stage + 1, Kind.INPUT_GRAD, microbatch)
    return done.get(needs, now + 1) <= now
