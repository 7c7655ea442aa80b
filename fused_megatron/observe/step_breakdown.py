"""Breakdown of a training step's time: compute, exposed communication, pipeline bubble, optimizer."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fused_megatron.observe.waits import OPTIMIZER, observed_by

COMPUTE = "compute"

T = TypeVar("T")


class StepBreakdown:
    """Measures, while record() is open, the waits and the optimizer of this rank's steps.

        breakdown = StepBreakdown(device)
        with breakdown.record():
            seconds = timed(trainer.train_step)
        print(breakdown.parts(seconds))        # {"compute": 0.9, "communication": 0.1, "optimizer": 0.05}

    "communication" is exposed communication: the time in which this rank waits for a collective and has nothing else to
    run; it includes waiting for slower ranks. "bubble" is the time in which a pipeline stage waits for a message of its
    neighbour, or at the end for the last stage: idle time and exposed transfers together. "optimizer" is the update of
    the weights, by our optimizer or torch's; "compute" is everything else.

    On a GPU, two events of the current stream enclose each wait and measure how long the stream stood still. Only this
    package's layers and transport report their waits (see waits.py): waits inside DDP's reducer, DTensor or torch's
    fused symmetric-memory products are not measured. While record() is open, backward runs in the calling thread, also
    on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []
        self._update_began: Any = None

    @contextmanager
    def record(self) -> Iterator[None]:
        """Discard earlier measurements, and measure everything that runs inside. Must not be nested."""
        self._spans.clear()
        with ExitStack() as stack:
            for hook in (
                register_optimizer_step_pre_hook(lambda *_: self._begin_update()),
                register_optimizer_step_post_hook(lambda *_: self._end_update()),
            ):
                stack.callback(hook.remove)
            # Otherwise backward on a GPU runs in another thread, which has no observer.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(observed_by(self))
            yield

    def parts(self, seconds: float) -> dict[str, float]:
        """Return the seconds of each part that occurred in a step of `seconds` seconds."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found: dict[str, float] = {}
        for part, begin, end in self._spans:
            took = begin.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - begin
            found[part] = found.get(part, 0.0) + took
        return {COMPUTE: max(0.0, seconds - sum(found.values())), **found}

    def wait(self, part: str, function: Callable[[], T]) -> T:
        """Measure function, as a WaitObserver; waits inside it are part of it."""
        begin = self._now()
        try:
            with observed_by(None):
                return function()
        finally:
            self._spans.append((part, begin, self._now()))

    def _begin_update(self) -> None:
        self._update_began = self._now()

    def _end_update(self) -> None:
        self._spans.append((OPTIMIZER, self._update_began, self._now()))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
