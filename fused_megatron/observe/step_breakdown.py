"""Parts of the time of a training step: compute, exposed communication, bubble, optimizer."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fused_megatron.observe.waits import observed_by

COMPUTE, OPTIMIZER = "compute", "optimizer"

T = TypeVar("T")


class StepBreakdown:
    """Times the waits and the update of the steps of this rank while record() is open.

        breakdown = StepBreakdown(device)
        with breakdown.record():
            seconds = timed(trainer.train_step)
        print(breakdown.parts(seconds))        # {"compute": 0.9, "communication": 0.1, "optimizer": 0.05}

    "communication" is what is exposed: the time for which this rank waits for a collective, with nothing left to run
    beside it; a slower rank that it waits for is in it, too. "bubble" is the wait of a pipeline stage for a message of
    its neighbour, or for the last stage at the end: idle time and exposed transfer in one. "optimizer" is the step of
    torch's optimizers, "compute" all the rest.

    On a GPU two events of the current stream stand around each wait: what lies between them is for how long the stream
    stood still. Only the waits of our own layers and transport are seen, which say so (waits.py): not those inside
    DDP's reducer, DTensor or torch's fused symmetric-memory products. While record() is open, backward runs in the
    thread that calls it, on a GPU, too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []
        self._update_began: Any = None

    @contextmanager
    def record(self) -> Iterator[None]:
        """Forget what was recorded, and time the waits of all that runs inside. Not to be nested."""
        self._spans.clear()
        with ExitStack() as stack:
            for hook in (
                register_optimizer_step_pre_hook(lambda *_: self._begin_update()),
                register_optimizer_step_post_hook(lambda *_: self._end_update()),
            ):
                stack.callback(hook.remove)
            # Else a GPU's backward has a thread of its own, in which nobody observes.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(observed_by(self))
            yield

    def parts(self, seconds: float) -> dict[str, float]:
        """Seconds of each part of a step that took `seconds` in all; those that are absent are left out."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found: dict[str, float] = {}
        for part, begin, end in self._spans:
            took = begin.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - begin
            found[part] = found.get(part, 0.0) + took
        return {COMPUTE: max(0.0, seconds - sum(found.values())), **found}

    def wait(self, part: str, function: Callable[[], T]) -> T:
        """As WaitObserver; a wait inside this one belongs to it."""
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
