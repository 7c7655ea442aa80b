"""Checkpoints that a thread writes while training goes on, from a copy of this rank's part in host memory."""

import copy
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fused_megatron.checkpoint.errors import SharedCheckpointError
from fused_megatron.checkpoint.save import WritePlan, agree_on_plan, write_checkpoint
from fused_megatron.checkpoint.shard_file import Entry
from fused_megatron.collectives.groups import group_rank
from fused_megatron.collectives.together import run_together
from fused_megatron.sharding.box import TensorBox

THREAD_NAME = "background-save"


class BackgroundSave:
    """Saves of a run, one at a time: start() copies the tensors and returns, and a thread writes the copy.

    The files, their order on the disk and the guarantees are the same as of `save_checkpoint`: a kill at any moment
    leaves the checkpoint before, or the new one. Every rank must call start() and finish() together.

    **No deadlock.** The ranks talk about a save in a group of its own, and nothing else uses it. On each rank one
    thread at a time uses it: start() before its thread exists and the thread until it ends, since start() and finish()
    wait for the thread. All ranks save the same steps in the same order, so their collectives on this group match. The
    thread waits for the threads of the other ranks only, never for a main thread. A main thread waits for its own
    thread. So no cycle of waits exists, whatever the main threads do meanwhile on other groups.

    **No weight changes before it is copied.** On a CPU start() returns after the copy. On a GPU the copies run on a
    stream of their own, which waits for the work before start(); before_update() makes the work that follows it wait
    for the copies, without a wait of the host.

    Args:
        group: all ranks of the run; made for these saves only, with a time-out that covers a slow disk. None: one rank.

    Memory: a copy of the tensors that this rank writes, in host memory (pinned if they are on a GPU), from the first
    save on. Of a box that several ranks hold, only the rank that writes it has a copy.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._plan: WritePlan | None = None
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the save has ended with an error on this rank, which finish() will raise."""
        return self._error is not None

    def start(
        self,
        folder: str | os.PathLike[str],
        step: int,
        tensors: Mapping[str, TensorBox],
        *,
        state: dict[str, Any],
        rank_tensors: Mapping[str, torch.Tensor] | None = None,
        keep: int | None = 2,
    ) -> None:
        """Finish the save before, copy the tensors and let a thread save them.

        Args: as save_checkpoint. On a GPU the tensors must not change before before_update() was called.

        Raises:
            InputError, CheckpointError: on every rank, if the arguments do not fit, the copy needs too much memory, or
                the save before failed.

        Communication: two exchanges of JSON; the first save sends the names and shapes of all tensors. The thread has
        four more.
        """
        self.finish()
        rank_tensors = rank_tensors or {}
        plan = self._plan = agree_on_plan(
            step, tensors, rank_tensors, state=state, keep=keep, group=self._group, known=self._plan
        )
        source = plan.sources(group_rank(self._group), tensors, rank_tensors)
        run_together(self._group, lambda: self._snapshot.take(source), SharedCheckpointError)
        arguments = (Path(folder), step, plan, copy.deepcopy(state), keep)
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True, name=THREAD_NAME)
        self._thread.start()

    def before_update(self) -> None:
        """Make work that is queued after this call wait until the tensors are copied."""
        self._snapshot.before_update()

    def finish(self) -> None:
        """Wait until the save is on the disk; do nothing if there is none.

        Raises:
            CheckpointError: on every rank, as save_checkpoint.
        """
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, folder: Path, step: int, plan: WritePlan, state: dict[str, Any], keep: int | None) -> None:
        try:
            write_checkpoint(folder, step, plan, self._snapshot, state=state, keep=keep, group=self._group)
        except BaseException as error:  # of any class: finish() raises it
            self._error = error


class Snapshot(Mapping[Entry, torch.Tensor]):
    """Copies of tensors in host memory, by entry. The memory is kept for the next copies of the same entries."""

    def __init__(self) -> None:
        self._copies: dict[Entry, torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def take(self, source: Mapping[Entry, torch.Tensor]) -> None:
        """Copy the tensors, from a CPU at once, from a GPU behind the work that is queued now."""
        before, self._copies = self._copies, {}
        # The memory of entries that are gone is freed before memory for new ones is taken.
        before = {entry: before[entry] for entry in source if entry in before}
        self._copied = None
        for entry in source:
            tensor = source[entry].detach()
            target = before.pop(entry, None)
            if target is None:
                target = torch.empty(entry.shape, dtype=entry.dtype, pin_memory=tensor.is_cuda)
            if tensor.is_cuda:
                self._copy_from_gpu(target, tensor)
            else:
                target.copy_(tensor)
            self._copies[entry] = target
        if self._copied is not None:
            assert self._stream is not None
            self._copied.record(self._stream)

    def _copy_from_gpu(self, target: torch.Tensor, tensor: torch.Tensor) -> None:
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        if self._copied is None:
            self._copied = torch.cuda.Event()
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            target.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # memory that is freed meanwhile must not be reused before it is copied

    def before_update(self) -> None:
        """Make the current stream wait for the copies."""
        if self._copied is not None:
            assert self._stream is not None
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)

    def __getitem__(self, entry: Entry) -> torch.Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._copies[entry]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._copies)

    def __len__(self) -> int:
        return len(self._copies)
