"""Python overhead of an op: the time of a call on tiny tensors beyond the compiled library ops that it makes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_CALLS_A_ROUND = 100
_WARM_UP_ROUNDS = 3


@dataclass(frozen=True)
class CallOverhead:
    """Microseconds per call in each round: of the public function, and of only the library ops that it calls."""

    call_us: list[float]
    library_us: list[float]

    @property
    def overhead_us(self) -> float:
        """Difference of the fastest rounds: other load on the machine can only add to such a short time."""
        return min(self.call_us) - min(self.library_us)


class _LibraryCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fused_megatron":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def measure_call_overhead(function: Callable[[], object], rounds: int = 30) -> CallOverhead:
    """Time a forward call with autograd recording, and then only the torch.ops.fused_megatron ops that it makes.

    Args:
        function: calls the public op on tensors so small that the arithmetic takes no time.
        rounds: number of pairs of measurements; the two measurements alternate.
    """
    with _LibraryCalls() as recorder:
        function()

    def library() -> None:
        for op, args, kwargs in recorder.calls:
            op(*args, **kwargs)

    result = CallOverhead([], [])
    for index in range(_WARM_UP_ROUNDS + rounds):
        call = _us_per_call(function)
        with torch.no_grad():  # as inside autograd.Function
            library_only = _us_per_call(library)
        if index >= _WARM_UP_ROUNDS:
            result.call_us.append(call)
            result.library_us.append(library_only)
    return result


def _us_per_call(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(_CALLS_A_ROUND):
        function()
    return (time.perf_counter() - start) / _CALLS_A_ROUND * 1e6
