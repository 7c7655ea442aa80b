"""Recording of some steps of a run by torch's profiler, with a snapshot of the GPU's memory."""

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

FIRST_STEP = 3
"""First recorded step of a process, counted from 0; the steps before it warm up caches, allocators and kernels."""
# Allocations and frees in the snapshot; torch keeps the newest.
_MOST_EVENTS = 1_000_000


class StepProfiler:
    """Records steps of this rank.

    `rank-0.trace.json` opens in https://ui.perfetto.dev or chrome://tracing; `rank-0.memory.pickle`, of a GPU, in
    https://pytorch.org/memory_viz. On a CPU the trace has the allocations.

    Args:
        folder: for the files.
        rank: number of this rank.
        device: of this rank.
        num_steps: number of steps to record; 0: none.
    """

    def __init__(self, folder: Path, rank: int, device: torch.device, num_steps: int) -> None:
        self.folder = folder
        self._rank = rank
        self._device = device
        self._num_steps = num_steps
        self._step = 0
        self._profiler: Any = None

    def begin_step(self) -> None:
        """Call this before each step."""
        if not self._num_steps or self._step != FIRST_STEP:
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)
        self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profiler.start()

    def end_step(self) -> Path | None:
        """Call this after each step; returns the trace when it has been written."""
        self._step += 1
        if self._profiler is None or self._step < FIRST_STEP + self._num_steps:
            return None
        return self.close()

    def close(self) -> Path | None:
        """Write what is recorded, if steps are being recorded; return the trace."""
        if self._profiler is None:
            return None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"rank-{self._rank}.trace.json"
        profiler.export_chrome_trace(str(trace))
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / f"rank-{self._rank}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        return trace
