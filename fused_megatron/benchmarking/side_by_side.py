"""Protocol of every speed comparison: same inputs, checked results, interleaved rounds, ratios within each round.

    comparison = compare(Case("bias_gelu", "[4096, 3072]", (x, bias), ours=..., unfused=...), CpuDevice())
    comparison.ratio("eager").median     # how many times faster than the unfused function

A step is forward and backward, timed separately. In every round each provider runs once. The order rotates by one from
round to round, so that other load on the machine affects all providers the same. A provider with a wrong result, one
that fails, and one that is not installed get one line and no figure.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import torch

from fused_megatron.benchmarking.exact_results import (
    MESSAGE_CHARACTERS,
    Exact,
    ForwardBackward,
    Judge,
    Op,
    Tensors,
    as_tuple,
)
from fused_megatron.benchmarking.timing_devices import TimingDevice, copy_step, page_faults
from fused_megatron.checks import dtype_name, first_line
from fused_megatron.observe.arithmetic import count_flops
from fused_megatron.observe.traffic import Traffic, measure_traffic
from fused_megatron.untrusted_files import ShownText as Text
from fused_megatron.untrusted_files import Size

# Bounds of numbers read from a results file, which may come from anybody, so that no ratio of them overflows.
Seconds = Annotated[float, msgspec.Meta(ge=1e-12, le=1e12)]
Part = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Bar = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]
Flops = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10**15)]

OURS, EAGER, COMPILE, BOUND = "ours", "eager", "compile", "bound"

_MOST_WARM_UPS = 8
_FEW_FAULTS = 100  # pages

# On a shared machine medians of the same code differ by this factor between runs, more than within a run.
BETWEEN_RUNS = 1.1
MET, EVEN, MISSED = "met", "even", "MISSED"
FASTER, SLOWER = "faster", "SLOWER"


@dataclass(frozen=True)
class Bars:
    """Performance targets of a case; None: no target.

    Attributes:
        eager, compile, best: least ratio of the time of eager, of torch.compile, or of the best other provider to ours.
        bound: largest ratio of our time to the bound's.
        memory: largest ratio of our peak memory to eager's.
    """

    eager: Bar | None = None
    compile: Bar | None = None
    bound: Bar | None = None
    memory: Bar | None = None
    best: Bar | None = None


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype.

    Attributes:
        op, label: names for tables: "bias_gelu", "[4096, 3072]".
        inputs: arguments of every provider; gradients are computed for tensors that require grad.
        ours: the fused op.
        unfused: the same in plain torch, as a user would write it; it is timed eagerly and with torch.compile.
        peers: for each other library a function that imports it and returns its op; ImportError: not installed.
        num_bytes: least number of bytes that must move, forward and backward.
        exact: for an op with random draws: computes the right outputs and gradients for the draw that a result shows,
            from (inputs, upstream gradients, outputs, gradients), and raises AssertionError for an impossible draw.
            None: the unfused function in float64 is exact.
        large: use float32 instead of float64 for the exact result on a CPU, to save time and memory.
        compute_bound: matrix products take most of the time: a copy is no bound, and no warm-up is needed.
        bars: performance targets.
    """

    op: str
    label: str
    inputs: tuple[Any, ...]
    ours: Op
    unfused: Op
    peers: Mapping[str, Callable[[], Op]] = field(default_factory=dict)
    num_bytes: int | None = None
    exact: Exact | None = None
    large: bool = False
    compute_bound: bool = False
    bars: Bars = Bars()


@dataclass(frozen=True)
class Rounds:
    """Length of a measurement: the rounds that fit into budget_s, but at least `fewest` and at most `most`."""

    budget_s: float = 2.5
    fewest: int = 3
    most: int = 60
    warm_up: bool = True  # False: only the check of the result runs before


@dataclass(frozen=True)
class Spread:
    """Percentiles of measured values."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Return the 20th, 50th and 80th percentile."""
        if len(values) < 2:
            return Spread(values[0], values[0], values[0])
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        return Spread(cuts[1], statistics.median(values), cuts[7])

    def beside(self, bar: float, above_and_below: tuple[str, str]) -> str:
        """Return the text for a median above or below the bar; "even" if it is near or the spread includes the bar."""
        if self.low <= bar <= self.high or bar / BETWEEN_RUNS <= self.median <= bar * BETWEEN_RUNS:
            return EVEN
        return above_and_below[self.median < bar]


@dataclass
class Comparison:
    """Measurements of one case.

    Attributes:
        seconds: of every provider in every round.
        faults: for each provider without seconds, the reason.
        notes: remarks on providers.
        tokens: of a training step, over all ranks.
        model_flops: of an op, all arithmetic (arithmetic.count_flops); of a training step, the matrix products of one
            forward and backward.
        hardware_flops: of a training step: model_flops and the products of recomputation.
        breakdown: of a training step: seconds of its parts for each provider, such as "compute", "communication"
            (exposed: nothing ran beside it), "bubble", "optimizer".
        forward_seconds: of an op: seconds of its forward pass.
    """

    op: Text
    label: Text
    dtype: Text
    num_bytes: Size | None
    bars: Bars
    seconds: dict[Text, list[Seconds]] = field(default_factory=dict)
    faults: dict[Text, Text] = field(default_factory=dict)
    notes: dict[Text, Text] = field(default_factory=dict)
    peak_bytes: dict[Text, Size] = field(default_factory=dict)
    traffic: dict[Text, Traffic] = field(default_factory=dict)
    default_malloc_ms: dict[Text, Part] = field(default_factory=dict)
    ranks: Count = 1
    tokens: Count | None = None
    model_flops: Flops | None = None
    hardware_flops: Flops | None = None
    breakdown: dict[Text, dict[Text, Part]] = field(default_factory=dict)
    forward_seconds: dict[Text, list[Seconds]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.label} {self.dtype}"

    def ms(self, provider: str) -> Spread | None:
        """Return the milliseconds of a provider."""
        return Spread.of([s * 1e3 for s in self.seconds[provider]]) if self.seconds.get(provider) else None

    def phases_ms(self, provider: str) -> tuple[Spread, Spread] | None:
        """Return the milliseconds of the forward and of the backward pass."""
        forward, both = self.forward_seconds.get(provider), self.seconds.get(provider)
        if not forward or not both:
            return None
        backward = [all_s - forward_s for all_s, forward_s in zip(both, forward, strict=True)]
        return Spread.of([s * 1e3 for s in forward]), Spread.of([s * 1e3 for s in backward])

    def ratio(self, provider: str) -> Spread | None:
        """Return a provider's time over ours, round by round: how many times faster ours is."""
        pairs = list(zip(self.seconds.get(provider, ()), self.seconds.get(OURS, ()), strict=False))
        return Spread.of([theirs / ours for theirs, ours in pairs]) if pairs else None

    def best_other(self) -> str | None:
        """Return the fastest other provider; None if there is none."""
        ratios = {name: self.ratio(name) for name in self.seconds if name not in (OURS, BOUND)}
        known = {name: ratio.median for name, ratio in ratios.items() if ratio is not None}
        return min(known, key=lambda name: known[name]) if known else None

    def over_bound(self) -> Spread | None:
        """Return our time over the time of the copy, round by round."""
        pairs = list(zip(self.seconds.get(OURS, ()), self.seconds.get(BOUND, ()), strict=False))
        return Spread.of([ours / bound for ours, bound in pairs]) if pairs else None

    def memory_ratio(self) -> float | None:
        """Return our peak memory over the unfused function's."""
        ours, eager = (self.peak_bytes.get(name) for name in (OURS, EAGER))
        return ours / eager if ours is not None and eager else None

    def gb_per_s(self, provider: str = OURS) -> float | None:
        """Return the bytes that must move, divided by the median time."""
        ms = self.ms(provider)
        return None if ms is None or self.num_bytes is None else self.num_bytes / ms.median / 1e6

    def intensity(self) -> float | None:
        """Return the FLOPs per byte that must move."""
        return self.model_flops / self.num_bytes if self.model_flops and self.num_bytes else None

    def gflop_per_s(self, provider: str = OURS) -> float | None:
        """Return the speed of each rank: its share of the arithmetic, divided by the median time."""
        ms = self.ms(provider)
        return None if ms is None or self.model_flops is None else self.model_flops / self.ranks / ms.median / 1e6

    def tokens_per_s(self, provider: str = OURS) -> float | None:
        """Return the tokens per second of all ranks together."""
        ms = self.ms(provider)
        return None if ms is None or self.tokens is None else self.tokens / ms.median * 1e3

    def efficiency(self, smallest: "Comparison") -> float | None:
        """Return a rank's speed over its speed in the smallest case: in FLOPs, or in tokens if FLOPs are unknown."""
        here, there = self.gflop_per_s(), smallest.gflop_per_s()
        if here is None or there is None:
            some = self.tokens_per_s(), smallest.tokens_per_s()
            here, there = (None if t is None else t / c.ranks for t, c in zip(some, (self, smallest), strict=True))
        return here / there if here is not None and there else None

    def verdict(self, provider: str) -> str | None:
        """Return "faster" or "SLOWER" for ours beside a provider, or "even" if two runs may differ as much."""
        ratio = self.ratio(provider)
        return None if ratio is None else ratio.beside(1, (FASTER, SLOWER))

    def verdicts(self) -> list[tuple[str, float, str]]:
        """Return (bar, rounded figure, "met", "MISSED" or "even") for every bar (target) that could be measured.

        "even": two runs may differ as much as the figure and its bar do.
        """
        best = self.best_other()
        bars = [(EAGER, self.bars.eager), (COMPILE, self.bars.compile)] + ([(best, self.bars.best)] if best else [])
        found = []
        for name, bar in bars:
            ratio = self.ratio(name)
            if bar is not None and ratio is not None:
                found.append((f"{name} >= {bar:g}x", round(ratio.median, 2), ratio.beside(bar, (MET, MISSED))))
        bar, bound = self.bars.bound, self.over_bound()
        if bar is not None and bound is not None:
            found.append((f"bound <= {bar:g}x", round(bound.median, 2), bound.beside(bar, (MISSED, MET))))
        bar, memory = self.bars.memory, self.memory_ratio()
        if bar is not None and memory is not None:
            found.append((f"memory <= 1/{1 / bar:g}", round(memory, 3), MET if memory <= bar else MISSED))
        return found


def compare(
    case: Case,
    device: TimingDevice,
    *,
    rounds: Rounds = Rounds(),
    compile_backend: str = "inductor",
    check: bool = True,
    release: Callable[[], object] = lambda: None,
) -> Comparison:
    """Check and time every provider of a case, forward and backward.

    Args:
        case: op, inputs and providers.
        device: of the inputs.
        rounds: length of the measurement.
        compile_backend: backend of torch.compile.
        check: first compare every result with the exact one, and measure memory and the bound. False: only time.
        release: returns unused memory of malloc to the system; called between the checks of a large case, since their
            peaks would add up.
    """
    result = Comparison(case.op, case.label, _dtype_of(case), case.num_bytes, case.bars)
    upstream = _upstream(case)
    judge = None
    if check:
        result.model_flops = count_flops(case.unfused, case.inputs)
        exact_dtype = torch.float32 if case.large and device.device.type == "cpu" else torch.float64
        judge = Judge(ForwardBackward(case.unfused, case.inputs, upstream), exact_dtype, case.exact, strict=OURS)
    compiled = torch.compile(case.unfused, fullgraph=True, dynamic=False, backend=compile_backend)
    providers: dict[str, Callable[[], Op]] = {
        OURS: lambda: case.ours,
        EAGER: lambda: case.unfused,
        COMPILE: lambda: compiled,
        **case.peers,
    }
    steps: dict[str, Callable[[], object]] = {}
    for name, provide in providers.items():
        if case.large:
            release()
        try:
            step = ForwardBackward(provide(), case.inputs, upstream)
            fault = None if judge is None else _try_out(name, step, judge, device, result, case.compute_bound)
        except ImportError as error:
            fault = f"not installed ({first_line(error, name_type=False)[:MESSAGE_CHARACTERS]})"
        except Exception as error:  # a peer's failure of any kind must not cost the figures of the others
            fault = f"failed: {first_line(error)[:MESSAGE_CHARACTERS]}"
        if fault:
            result.faults[name] = fault
        else:
            steps[name] = step
    del judge
    if case.large:
        release()
    if check and case.num_bytes and not case.compute_bound:
        steps[BOUND] = copy_step(case.num_bytes, device.device)
    result.seconds = side_by_side(steps, device, rounds, result.forward_seconds)
    return result


def _try_out(
    name: str, step: ForwardBackward, judge: Judge, device: TimingDevice, result: Comparison, compute_bound: bool
) -> str | None:
    """Return the reason not to time a provider, or None; add its notes, peak memory and traffic to the result."""
    if name == COMPILE and not compute_bound:
        step()  # compile before memory and traffic are measured
    results: list[tuple[Tensors, Tensors]] = []
    peak = device.peak_bytes(lambda: results.append(step()))
    fault, note = judge.fault(name, *results.pop())
    if note:
        result.notes[name] = note
    if not fault:
        result.peak_bytes.update({} if peak is None else {name: peak})
        if name in (OURS, EAGER) and result.num_bytes is not None and not compute_bound:
            result.traffic[name] = measure_traffic(step)
    return fault


def side_by_side(
    steps: Mapping[str, Callable[[], object]],
    device: TimingDevice,
    rounds: Rounds = Rounds(),
    forward: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Time every step in every round; entries i of all lists were measured within one round.

    Args:
        steps: by name.
        device: that the steps run on.
        rounds: length of the measurement.
        forward: filled with the seconds of the forward passes, for steps that are a ForwardBackward.

    Returns:
        Seconds of each step, by name.
    """
    names = list(steps)
    spent = _warm_up(steps, device, rounds.budget_s) if rounds.warm_up else 0.0
    count = int(rounds.budget_s / max(spent, 1e-9)) if rounds.warm_up else rounds.fewest
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(min(max(count, rounds.fewest), rounds.most)):
        turn = index % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            step = steps[name]
            if forward is not None and isinstance(step, ForwardBackward):
                first, second = device.seconds_of_two(step.forward, step.backward)
                forward.setdefault(name, []).append(first)
                seconds[name].append(first + second)
            else:
                seconds[name].append(device.seconds(step))
    return seconds


def _warm_up(steps: Mapping[str, Callable[[], object]], device: TimingDevice, budget_s: float) -> float:
    """Run rounds until malloc has all pages that it needs, or the budget is spent; return the last round's seconds."""
    begun = time.monotonic()
    spent = 0.0
    previous = math.inf
    for _ in range(_MOST_WARM_UPS):
        before = page_faults()
        spent = sum(device.seconds(step) for step in steps.values())
        faults = page_faults() - before
        # If the faults hardly decrease, every round has them (malloc's default settings, or a library's own buffers).
        if faults < _FEW_FAULTS or faults > 0.9 * previous or time.monotonic() - begun > budget_s:
            break
        previous = faults
    return spent


def _upstream(case: Case) -> list[torch.Tensor]:
    """Return the upstream gradients: random values, or 1 for a scalar loss."""
    with torch.no_grad():
        outputs = as_tuple(case.unfused(*case.inputs))
    return [torch.randn_like(t) if t.dim() else torch.ones_like(t) for t in outputs]


def _dtype_of(case: Case) -> str:
    dtypes = [t.dtype for t in case.inputs if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return dtype_name(dtypes[0]) if dtypes else ""
