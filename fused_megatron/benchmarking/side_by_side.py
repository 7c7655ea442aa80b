"""One protocol for every comparison of speed: same inputs, checked results, interleaved rounds, ratios pair by pair.

    comparison = compare(Case("bias_gelu", "[4096, 3072]", (x, bias), ours=..., unfused=...), CpuDevice())
    comparison.ratio("eager").median     # how many times faster than the unfused function

A step is forward and backward, each with its time. In every round each provider runs once, in an order that moves on
by one from round to round, so that whatever else the machine does falls on all alike. A provider whose result is wrong,
that fails or that is not installed gets one line and no figure.
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

# What is read back from files of anybody lies within these bounds, so that no ratio of it overflows.
Seconds = Annotated[float, msgspec.Meta(ge=1e-12, le=1e12)]
Part = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Bar = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]
Flops = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10**15)]

OURS, EAGER, COMPILE, BOUND = "ours", "eager", "compile", "bound"

_MOST_WARM_UPS = 8
_FEW_FAULTS = 100  # pages

# Medians of the same code move by so much from one run to the next on a shared machine, more than within a run.
BETWEEN_RUNS = 1.1
MET, EVEN, MISSED = "met", "even", "MISSED"
FASTER, SLOWER = "faster", "SLOWER"


@dataclass(frozen=True)
class Bars:
    """What is promised: at least so many times faster (than eager, compile, or the best of all others), at most so
    many times the bound, at most so much memory."""

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
        inputs: arguments of every provider; tensors that require grad get their gradient.
        ours: the fused op.
        unfused: the same in plain torch, as a user would write it: run as it is, and through torch.compile.
        peers: other libraries: a function that imports and returns theirs; ImportError means not installed.
        num_bytes: the least that must move, forward and backward.
        exact: where there is chance in the result: from (inputs, upstream gradients, outputs, gradients) to what the
            outputs and gradients should be for the draw that they show; AssertionError for a draw that cannot be. None:
            the unfused function in float64 is exact.
        large: float64 would take too much of a CPU's time and memory; float32 stands in there.
        compute_bound: its products take the time: no copy is its bound, and it does not feel the cold.
        bars: what is promised.
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
    """How long to measure: as many rounds as fit in budget_s, within limits."""

    budget_s: float = 2.5
    fewest: int = 3
    most: int = 60
    warm_up: bool = True  # else the check is all that runs before


@dataclass(frozen=True)
class Spread:
    """Percentiles of what was measured."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """The 20th, 50th and 80th percentile."""
        if len(values) < 2:
            return Spread(values[0], values[0], values[0])
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        return Spread(cuts[1], statistics.median(values), cuts[7])

    def beside(self, bar: float, above_and_below: tuple[str, str]) -> str:
        """The word for a median above the bar or below it; "even" where it is near, or the spread includes the bar."""
        if self.low <= bar <= self.high or bar / BETWEEN_RUNS <= self.median <= bar * BETWEEN_RUNS:
            return EVEN
        return above_and_below[self.median < bar]


@dataclass
class Comparison:
    """What was measured of one case: seconds of every provider in every round; a line for each that has none.

    Of an op also the seconds of its forward pass by itself, and in model_flops all of its arithmetic
    (arithmetic.count_flops).

    Of a training step also: tokens of all ranks together, what its products cost (model_flops: forward and backward
    once; hardware_flops: recomputation too), and by provider where the seconds of a step went: parts such as
    "compute", "communication" (exposed: nothing ran beside it), "bubble", "optimizer".
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
        """Milliseconds of a provider."""
        return Spread.of([s * 1e3 for s in self.seconds[provider]]) if self.seconds.get(provider) else None

    def phases_ms(self, provider: str) -> tuple[Spread, Spread] | None:
        """Milliseconds of the forward and of the backward pass."""
        forward, both = self.forward_seconds.get(provider), self.seconds.get(provider)
        if not forward or not both:
            return None
        backward = [all_s - forward_s for all_s, forward_s in zip(both, forward, strict=True)]
        return Spread.of([s * 1e3 for s in forward]), Spread.of([s * 1e3 for s in backward])

    def ratio(self, provider: str) -> Spread | None:
        """A provider's time over ours, round by round: how many times faster ours is."""
        pairs = list(zip(self.seconds.get(provider, ()), self.seconds.get(OURS, ()), strict=False))
        return Spread.of([theirs / ours for theirs, ours in pairs]) if pairs else None

    def best_other(self) -> str | None:
        """The provider that comes nearest to ours; None where ours stands alone."""
        ratios = {name: self.ratio(name) for name in self.seconds if name not in (OURS, BOUND)}
        known = {name: ratio.median for name, ratio in ratios.items() if ratio is not None}
        return min(known, key=lambda name: known[name]) if known else None

    def over_bound(self) -> Spread | None:
        """Our time over the copy's, round by round."""
        pairs = list(zip(self.seconds.get(OURS, ()), self.seconds.get(BOUND, ()), strict=False))
        return Spread.of([ours / bound for ours, bound in pairs]) if pairs else None

    def memory_ratio(self) -> float | None:
        """Our peak memory over the unfused function's."""
        ours, eager = (self.peak_bytes.get(name) for name in (OURS, EAGER))
        return ours / eager if ours is not None and eager else None

    def gb_per_s(self, provider: str = OURS) -> float | None:
        """The bytes that must move over the median time."""
        ms = self.ms(provider)
        return None if ms is None or self.num_bytes is None else self.num_bytes / ms.median / 1e6

    def intensity(self) -> float | None:
        """FLOPs a byte that must move."""
        return self.model_flops / self.num_bytes if self.model_flops and self.num_bytes else None

    def gflop_per_s(self, provider: str = OURS) -> float | None:
        """Of each rank: its share of the arithmetic over the median time."""
        ms = self.ms(provider)
        return None if ms is None or self.model_flops is None else self.model_flops / self.ranks / ms.median / 1e6

    def tokens_per_s(self, provider: str = OURS) -> float | None:
        """Of all ranks together."""
        ms = self.ms(provider)
        return None if ms is None or self.tokens is None else self.tokens / ms.median * 1e3

    def efficiency(self, smallest: "Comparison") -> float | None:
        """What a rank does here over what one does in the smallest case: FLOPs, or tokens where those are unknown."""
        here, there = self.gflop_per_s(), smallest.gflop_per_s()
        if here is None or there is None:
            some = self.tokens_per_s(), smallest.tokens_per_s()
            here, there = (None if t is None else t / c.ranks for t, c in zip(some, (self, smallest), strict=True))
        return here / there if here is not None and there else None

    def verdict(self, provider: str) -> str | None:
        """Whether ours is "faster" than a provider, "SLOWER", or "even": no further apart than two runs may be."""
        ratio = self.ratio(provider)
        return None if ratio is None else ratio.beside(1, (FASTER, SLOWER))

    def verdicts(self) -> list[tuple[str, float, str]]:
        """(bar, figure, "met", "MISSED" or "even") for every bar that could be measured, figures as rounded for people.

        Even: the figure and its bar are no further apart than two runs may be.
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
        case: what to compare.
        device: where its inputs lie.
        rounds: how long.
        compile_backend: torch.compile's.
        check: compare results with the exact one first, and measure memory and the bound. False: only time.
        release: gives back memory that malloc holds unused; called between the checks of a large case, whose peaks
            would add up.
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
    """Why a provider is not to be timed, or None; what one step shows besides goes into the result."""
    if name == COMPILE and not compute_bound:
        step()  # compiles, which a product's seconds need not be told apart from
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
    """Seconds of every step in every round: entry i of two lists is one pair, measured within one round.

    forward: filled with the seconds of the forward passes of steps that are a ForwardBackward.
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
    """Run rounds until malloc has all the pages that it needs, or the budget is spent; the seconds of the last one."""
    begun, spent, previous = time.monotonic(), 0.0, math.inf
    for _ in range(_MOST_WARM_UPS):
        before = page_faults()
        spent = sum(device.seconds(step) for step in steps.values())
        faults = page_faults() - before
        # Fewer in vain: what is left comes with every round (malloc's default settings, or a library's own buffers).
        if faults < _FEW_FAULTS or faults > 0.9 * previous or time.monotonic() - begun > budget_s:
            break
        previous = faults
    return spent


def _upstream(case: Case) -> list[torch.Tensor]:
    """The gradients that come from above: random, and 1 for a scalar loss."""
    with torch.no_grad():
        outputs = as_tuple(case.unfused(*case.inputs))
    return [torch.randn_like(t) if t.dim() else torch.ones_like(t) for t in outputs]


def _dtype_of(case: Case) -> str:
    dtypes = [t.dtype for t in case.inputs if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return dtype_name(dtypes[0]) if dtypes else ""
