"""Where the seconds of a training step go: compute, exposed communication, bubble, optimizer."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from fused_megatron.collectives.transfers import Transfer
from fused_megatron.pipeline.run.connections import Connections
from fused_megatron.pipeline.run.messages import Messages

COMPUTE, COMMUNICATION, BUBBLE, OPTIMIZER = "compute", "communication", "bubble", "optimizer"

# Where our code waits, or updates. A wait inside another one belongs to the outer.
_Seams = tuple[tuple[str, type, str], ...]
_SEAMS: _Seams = (
    (COMMUNICATION, Transfer, "wait"), (COMMUNICATION, dist.Work, "wait"), (OPTIMIZER, torch.optim.AdamW, "step"),
)  # fmt: skip
_PIPELINE_SEAMS: _Seams = ((BUBBLE, Messages, "take"), (BUBBLE, Connections, "share_losses"))


class StepBreakdown:
    """Times the waits and the update of the steps of this rank while record() is open.

        breakdown = StepBreakdown(device, pipeline=mesh.pp_size > 1)
        with breakdown.record():
            seconds = timed(trainer.train_step)
        print(breakdown.parts(seconds))        # {"compute": 0.9, "communication": 0.1, "optimizer": 0.05}

    "communication" is what is exposed: the time for which this rank waits for a collective, with nothing left to run
    beside it; a slower rank that it waits for is in it, too. "bubble" is the wait of a pipeline stage for a message of
    its neighbour, or for the last stage at the end: idle time and exposed transfer in one. "optimizer" is AdamW's step,
    "compute" all the rest.

    On a GPU two events of the current stream stand around each wait: what lies between them is for how long the stream
    stood still. Only waits that Python makes are seen: those of all our layers, but not those inside DDP's reducer,
    DTensor or torch's fused symmetric-memory products.
    """

    def __init__(self, device: torch.device, *, pipeline: bool = False) -> None:
        self._device = device
        self._seams = _SEAMS + (_PIPELINE_SEAMS if pipeline else ())
        self._spans: list[tuple[str, Any, Any]] = []
        self._inside = threading.local()

    @contextmanager
    def record(self) -> Iterator[None]:
        """Forget what was recorded, and time the waits of all that runs inside. Not to be nested."""
        self._spans.clear()
        thread = threading.current_thread()
        with ExitStack() as stack:
            for part, owner, name in self._seams:
                stack.enter_context(patch.object(owner, name, self._timed(part, getattr(owner, name), thread)))
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

    def _timed(self, part: str, function: Callable[..., Any], thread: threading.Thread) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            # On a CPU threads of the pipeline wait for its sends, which delays no one. A GPU's backward has a thread
            # of its own.
            aside = self._device.type == "cpu" and threading.current_thread() is not thread
            alone = bool(args) and isinstance(args[0], Transfer) and not args[0].under_way  # of a group of one
            if aside or alone or getattr(self._inside, "wait", False):
                return function(*args, **kwargs)
            self._inside.wait = True
            begin = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                self._spans.append((part, begin, self._now()))
                self._inside.wait = False

        return timed

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
