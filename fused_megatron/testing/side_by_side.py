"""One protocol for every comparison of speed: same inputs, checked results, interleaved rounds, ratios pair by pair.

    comparison = compare(Case("bias_gelu", "[4096, 3072]", (x, bias), ours=..., unfused=...), CpuDevice())
    comparison.ratio("eager").median     # how many times faster than the unfused function

Forward and backward are timed together. In every round each provider runs once, in an order that moves on by one from
round to round, so that whatever else the machine does falls on all alike. A provider whose result is wrong, that fails
or that is not installed gets one line and no figure.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fused_megatron.testing.timing_devices import TimingDevice, copy_step, page_faults
from fused_megatron.testing.traffic import Traffic, measure_traffic

OURS, EAGER, COMPILE, BOUND = "ours", "eager", "compile", "bound"

# The norm of the error over the norm of the exact result. float32: sums of 1e5 terms in another order. 16 bit: one or
# two roundings (half a unit each), and torch's own sums in 16 bit; ours is rounded once.
INEXACT = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Beyond this no rounding is to blame.
WRONG = 0.25
_MOST_WARM_UPS = 8
_PIECE_ELEMENTS = 1 << 24
_FEW_FAULTS = 100  # pages

Op = Callable[..., Any]
Tensors = Sequence[torch.Tensor]
Step = Callable[[], tuple[Tensors, Tensors]]


@dataclass(frozen=True)
class Bars:
    """What is promised: at least so many times faster (than eager, compile, or the best of all others), at most so
    many times the bound, at most so much memory."""

    eager: float | None = None
    compile: float | None = None
    bound: float | None = None
    memory: float | None = None
    best: float | None = None


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
        bars: what is promised.
    """

    op: str
    label: str
    inputs: tuple[Any, ...]
    ours: Op
    unfused: Op
    peers: Mapping[str, Callable[[], Op]] = field(default_factory=dict)
    num_bytes: int | None = None
    exact: Callable[[Sequence[Any], Tensors, Tensors, Tensors], Tensors] | None = None
    large: bool = False
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


@dataclass
class Comparison:
    """What was measured of one case: seconds of every provider in every round; a line for each that has none.

    Of a training step also: tokens of all ranks together, what its products cost (model_flops: forward and backward
    once; hardware_flops: recomputation too), and by provider where the seconds of a step went: parts such as
    "compute", "communication" (exposed: nothing ran beside it), "bubble", "optimizer".
    """

    op: str
    label: str
    dtype: str
    num_bytes: int | None
    bars: Bars
    seconds: dict[str, list[float]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    default_malloc_ms: dict[str, float] = field(default_factory=dict)
    ranks: int = 1
    tokens: int | None = None
    model_flops: int | None = None
    hardware_flops: int | None = None
    breakdown: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.label} {self.dtype}"

    def ms(self, provider: str) -> Spread | None:
        """Milliseconds of a provider."""
        return Spread.of([s * 1e3 for s in self.seconds[provider]]) if self.seconds.get(provider) else None

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

    def verdicts(self) -> list[tuple[str, float, bool]]:
        """(bar, figure, met) for every bar that could be measured, figures as rounded for people."""
        found = []
        for name in (EAGER, COMPILE):
            bar, ratio = getattr(self.bars, name), self.ratio(name)
            if bar is not None and ratio is not None:
                figure = round(ratio.median, 2)
                found.append((f"{name} >= {bar:g}x", figure, figure >= bar))
        best = self.best_other()
        ratio = self.ratio(best) if best is not None else None
        if self.bars.best is not None and ratio is not None:
            figure = round(ratio.median, 2)
            found.append((f"{best} >= {self.bars.best:g}x", figure, figure >= self.bars.best))
        bound = self.over_bound()
        if self.bars.bound is not None and bound is not None:
            figure = round(bound.median, 2)
            found.append((f"bound <= {self.bars.bound:g}x", figure, figure <= self.bars.bound))
        memory = self.memory_ratio()
        if self.bars.memory is not None and memory is not None:
            found.append((f"memory <= 1/{1 / self.bars.memory:g}", round(memory, 3), memory <= self.bars.memory))
        return found


def compare(
    case: Case,
    device: TimingDevice,
    *,
    rounds: Rounds = Rounds(),
    compile_backend: str = "inductor",
    check: bool = True,
) -> Comparison:
    """Check and time every provider of a case, forward and backward.

    Args:
        case: what to compare.
        device: where its inputs lie.
        rounds: how long.
        compile_backend: torch.compile's.
        check: compare results with the exact one first, and measure memory and the bound. False: only time.
    """
    result = Comparison(case.op, case.label, _dtype_name(case), case.num_bytes, case.bars)
    upstream = _upstream(case)
    judge = _Judge(case, upstream, device) if check else None
    compiled = torch.compile(case.unfused, fullgraph=True, dynamic=False, backend=compile_backend)
    providers: dict[str, Callable[[], Op]] = {
        OURS: lambda: case.ours,
        EAGER: lambda: case.unfused,
        COMPILE: lambda: compiled,
        **case.peers,
    }
    steps: dict[str, Callable[[], object]] = {}
    for name, provide in providers.items():
        fault = note = None
        try:
            step = forward_backward(provide(), case.inputs, upstream)
            if judge is not None:
                if name == COMPILE:
                    step()  # compiles
                fault, note, peak = judge.try_out(name, step)
                result.peak_bytes.update({} if fault or peak is None else {name: peak})
                if name in (OURS, EAGER) and not fault and case.num_bytes is not None:
                    result.traffic[name] = measure_traffic(step)
        except ImportError as error:
            fault = f"not installed ({_first_line(error)})"
        except Exception as error:  # a peer's failure of any kind must not cost the figures of the others
            fault = f"failed: {type(error).__name__}: {_first_line(error)}"
        if note:
            result.notes[name] = note
        if fault:
            result.faults[name] = fault
        else:
            steps[name] = step
    del judge
    if check and case.num_bytes:
        steps[BOUND] = copy_step(case.num_bytes, device.device)
    result.seconds = side_by_side(steps, device, rounds)
    return result


def side_by_side(
    steps: Mapping[str, Callable[[], object]], device: TimingDevice, rounds: Rounds = Rounds()
) -> dict[str, list[float]]:
    """Seconds of every step in every round: entry i of two lists is one pair, measured within one round."""
    names = list(steps)
    spent = _warm_up(steps, device, rounds.budget_s) if rounds.warm_up else 0.0
    count = int(rounds.budget_s / max(spent, 1e-9)) if rounds.warm_up else rounds.fewest
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(min(max(count, rounds.fewest), rounds.most)):
        turn = index % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(device.seconds(steps[name]))
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


def forward_backward(op: Op, inputs: Sequence[Any], upstream: Tensors) -> Step:
    """A step of (outputs, gradients of every input that requires one)."""
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]

    def step() -> tuple[Tensors, Tensors]:
        outputs = _tuple(op(*inputs))
        return outputs, torch.autograd.grad(outputs, wanted, upstream)

    return step


class _Judge:
    """The exact result of a case, and what is wrong with another."""

    def __init__(self, case: Case, upstream: Tensors, device: TimingDevice) -> None:
        self._case = case
        self._upstream = upstream
        self._device = device
        self._dtype = next(t.dtype for t in case.inputs if isinstance(t, torch.Tensor))
        self._before = self._fingerprint()
        self._exact: Tensors | None = None
        if case.exact is None:
            dtype = torch.float32 if case.large and device.device.type == "cpu" else torch.float64
            inputs = [_as_exact(t, dtype) for t in case.inputs]
            outputs, gradients = forward_backward(case.unfused, inputs, [t.to(dtype) for t in upstream])()
            self._exact = [*(t.detach() for t in outputs), *gradients]

    def _fingerprint(self) -> list[float]:
        tensors = [t for t in self._case.inputs if isinstance(t, torch.Tensor)]
        return [t.detach().sum(dtype=torch.float64).item() for t in (*tensors, *self._upstream)]

    def try_out(self, provider: str, step: Step) -> tuple[str | None, str | None, int | None]:
        """Run a step once: (why the provider is not to be timed or None, a remark or None, peak bytes)."""
        results: list[tuple[Tensors, Tensors]] = []
        peak = self._device.peak_bytes(lambda: results.append(step()))
        if self._fingerprint() != self._before:
            raise RuntimeError("it writes over its inputs, which the other providers need")
        return *self._fault(provider, *results[0]), peak

    def _fault(self, provider: str, outputs: Tensors, gradients: Tensors) -> tuple[str | None, str | None]:
        try:
            exact = self._exact or self._case.exact(self._case.inputs, self._upstream, outputs, gradients)  # type: ignore
        except AssertionError as impossible:
            return f"wrong: {_first_line(impossible)}", None
        names = [f"output {i}" for i in range(len(outputs))] + [f"gradient {i}" for i in range(len(gradients))]
        worst, off = 0.0, []
        for name, got, want in zip(names, (*outputs, *gradients), exact, strict=True):
            if got.shape != want.shape:
                return f"wrong: {name} has shape {tuple(got.shape)}, not {tuple(want.shape)}", None
            error = _relative_error(got.detach(), want)
            if not error <= INEXACT[self._dtype]:  # also NaN
                worst = error if not error <= worst else worst
                off.append(f"{name} {error:.1%}" if error > 1e-3 else f"{name} {error:.1e}")
        if not off:
            return None, None
        text = f"{', '.join(off)} off"
        if provider == OURS or not worst <= WRONG:
            return f"wrong: {text}", None
        return None, f"inexact: {text}"


def _relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the error over the norm of what is right, in pieces: a whole difference could be gigabytes."""
    error = norm = 0.0
    for some, right in zip(*(t.reshape(-1).split(_PIECE_ELEMENTS) for t in (got, want)), strict=True):
        error += torch.linalg.vector_norm(some.to(want.dtype) - right).item() ** 2
        norm += torch.linalg.vector_norm(right).item() ** 2
    return math.sqrt(error / norm) if norm > 0 else math.sqrt(error)


def _as_exact(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def _upstream(case: Case) -> list[torch.Tensor]:
    """The gradients that come from above: random, and 1 for a scalar loss."""
    with torch.no_grad():
        outputs = _tuple(case.unfused(*case.inputs))
    return [torch.randn_like(t) if t.dim() else torch.ones_like(t) for t in outputs]


def _tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def _dtype_name(case: Case) -> str:
    dtypes = [t.dtype for t in case.inputs if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return str(dtypes[0]).removeprefix("torch.") if dtypes else ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
