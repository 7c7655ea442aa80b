"""The limit of our GPT's step: its matrix products and attention calls alone, and a copy of all other bytes.

One step of our GPT on this rank is recorded. Then its products and its calls of attention, forward and backward, run
again on the same operands, without any other op and without a collective. The other ops of the step (norms,
activations, losses, the optimizer ..) read and write a number of bytes; copy_step moves as many.
"""

from collections.abc import Callable
from typing import Any

import torch
from gpt_layouts import Layout, Size, TrainingStep, Weights, batch_of
from gpt_of_ours import our_step
from torch.utils._python_dispatch import TorchDispatchMode

from fused_megatron.benchmarking.timing_devices import copy_step
from fused_megatron.observe.kernel_counts import PRODUCT, kernels_of, product_flops

# A copy between buffers that no cache holds.
_COPY_BYTES = 2**28

Call = Callable[[], Any]


class RecordedCalls(TorchDispatchMode):
    """Context manager that records the products and attention calls of a step, and counts the bytes of other ops.

    Attributes:
        calls: functions that run a product or an attention on its operands again.
        flops: their floating-point operations, as torch counts them.
        other_bytes: bytes that all other ops read and write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.flops = 0
        self.other_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        kernels = kernels_of(func, args, kwargs, results, "cpu")
        if kernels is None:
            return results
        if kernels.kind == PRODUCT or "attention" in func._schema.name:
            self.calls.append(lambda: func(*args, **kwargs))
            self.flops += product_flops(func, args, kwargs, results) or 0
        else:
            self.other_bytes += kernels.num_bytes
        return results


def recorded_calls(size: Size, layout: Layout, weights: Weights) -> RecordedCalls:
    """Record the second step of our GPT: the first one sends the shapes of messages, too."""
    step, batch = our_step(size, layout, weights), batch_of(size, layout)
    step.run(*batch)
    with RecordedCalls() as recorded:
        step.run(*batch)
    return recorded


def products_alone(size: Size, layout: Layout, weights: Weights) -> TrainingStep:
    """Build a provider that runs the products and the attention calls of a step."""
    recorded = recorded_calls(size, layout, weights)
    return TrainingStep(lambda tokens, target: _run(recorded.calls), trains=False)


def products_and_copies(size: Size, layout: Layout, weights: Weights) -> TrainingStep:
    """Build a provider that also copies as many bytes as the other ops of a step read and write."""
    recorded = recorded_calls(size, layout, weights)
    copies, rest = divmod(recorded.other_bytes, _COPY_BYTES)
    whole, last = copy_step(_COPY_BYTES, torch.device("cpu")), copy_step(rest, torch.device("cpu"))
    calls = [*recorded.calls, *[whole] * copies, last]
    return TrainingStep(lambda tokens, target: _run(calls), trains=False)


@torch.no_grad()
def _run(calls: list[Call]) -> None:
    for call in calls:
        call()
