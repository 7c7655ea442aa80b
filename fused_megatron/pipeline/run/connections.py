"""Control plane of a pipeline rank: process groups, shared losses, fault reports."""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fused_megatron.collectives.groups import Group, group_rank, group_size, is_fake
from fused_megatron.observe.waits import BUBBLE, wait_for
from fused_megatron.pipeline.run.channels import Channels, Transport, make_group
from fused_megatron.pipeline.run.faults import FaultRecord, PipelineError, lost_peers
from fused_megatron.pipeline.run.step_table import StepTable
from fused_megatron.pipeline.schedule.action import Schedule
from fused_megatron.pipeline.schedule.routing import channels_of

# Seconds until a cut connection is noticed, after a collective has failed because of it.
_NOTICE_S = 0.3
_PROBE_TAG = 1


class Connections:
    """Transport of a pipeline, and a control group on the CPU for facts that all its ranks must know.

    Args:
        name: unique name of this pipeline, the same on all ranks.
        schedule: the lowered schedule.
        pp_group: the ranks of the pipeline; None for one rank.
        device: device of the tensors.
        transport: replaces Channels; None for Channels. Required for a fake group.
        timeout: time-out of a wait.

    Communication: makes and uses every connection once, in the same order on all ranks.
    """

    def __init__(
        self,
        name: str,
        schedule: Schedule,
        pp_group: Group,
        device: torch.device,
        transport: Transport | None,
        timeout: timedelta,
    ) -> None:
        self.rank = group_rank(pp_group)
        self.num_ranks = group_size(pp_group)
        self.device = device
        self.closed = False
        self._pp_group = pp_group
        self._last = schedule.placement[-1]
        self._control: Any = None
        self.global_ranks = [0] if pp_group is None else dist.get_process_group_ranks(pp_group)
        # The group of each tied weight on this rank, and its global ranks; None where it has no other rank.
        self.tied_groups: list[tuple[Any, Sequence[int]]] = [(None, ())] * len(schedule.tied)
        store = None
        if pp_group is not None:
            if not is_fake(pp_group):
                store = dist.PrefixStore(name, pp_group.get_group_store())
            cpu = torch.device("cpu")
            self._control = make_group(store, "control", self.rank, self.num_ranks, cpu, timeout)
            for index, stages in enumerate(schedule.tied):
                ranks = sorted({schedule.placement[stage] for stage in stages})
                if self.rank in ranks and len(ranks) > 1:
                    tied_rank = ranks.index(self.rank)
                    group = make_group(store, f"tied/{index}", tied_rank, len(ranks), device, timeout)
                    self.tied_groups[index] = group, [self.global_ranks[each] for each in ranks]
        if transport is None and store is not None:
            transport = Channels(channels_of(schedule), self.rank, store, device, timeout)
        self.transport = transport
        self.faults = FaultRecord(store)
        self.table = StepTable(self._control, store, self.rank, self.num_ranks)

    def share_losses(self, losses: Sequence[torch.Tensor] | None, count: int) -> torch.Tensor:
        """Send the losses from the rank of the last stage to every rank; returns them, [count] float64."""
        values = torch.zeros(count, dtype=torch.float64, device=self.device)
        if losses is not None:
            values = torch.stack([loss.double() for loss in losses])
        if self._control is None:
            return values
        if self.device.type == "cuda":  # on the stream: the host does not wait
            with lost_peers():
                wait_for(BUBBLE, lambda: dist.broadcast(values, group_src=self._last, group=self._pp_group))
            return values
        with lost_peers():
            wait_for(BUBBLE, lambda: self._broadcast(values))
        return values

    def _broadcast(self, values: torch.Tensor) -> None:
        """Broadcast over the control group. No frame of a traceback may hold the group, or close() would not cut it."""
        options = dist.BroadcastOptions()
        options.rootRank = self._last
        self._control.broadcast([values], options).wait()

    def _add_over_ranks(self, values: torch.Tensor) -> None:
        """Sum over the control group. As in _broadcast no frame of a traceback may hold the group."""
        self._control.allreduce([values]).wait()

    def add_auxiliary_losses(
        self, losses: torch.Tensor, auxiliary: Sequence[Mapping[int, torch.Tensor]]
    ) -> torch.Tensor:
        """Return losses [count] plus the auxiliary losses of all stages, by microbatch, on every rank.

        Communication: one all-reduce of 8 bytes for each microbatch.
        """
        own = torch.zeros_like(losses)
        for of_stage in auxiliary:
            for microbatch, loss in of_stage.items():
                own[microbatch] += loss
        if self._control is None:
            return losses + own
        with lost_peers():
            if self.device.type == "cuda":  # on the stream: the host does not wait
                wait_for(BUBBLE, lambda: dist.all_reduce(own, group=self._pp_group))
            else:
                wait_for(BUBBLE, lambda: self._add_over_ranks(own))
        return losses + own

    def fault(self, lost: int | None, error: Exception, action: str | None) -> PipelineError:
        """Return the error to raise after a message failed: the first fault of the pipeline, or a rank that is gone."""
        known = self.faults.read()
        if known is None:
            # Connections closed without a reason: the first rank that looks decides, before it closes its own. If the
            # store is gone, the first rank is, since it keeps the store; other peers closed only for that reason.
            if lost is None or not self.faults.readable:
                dead = self._dead_peer()
                lost = dead if lost is None or dead >= 0 else lost
            reason = str(error).partition(". This is typically")[0]  # without gloo's long guess at the cause
            self.faults.write(lost, None, reason)
            known = self.faults.read() or (lost, None, reason)
        here = f"pipeline rank {self.rank} was {f'at {action}' if action else 'between steps'}"
        rank, where, text = known
        if rank < 0:
            return PipelineError(f"pipeline: another rank is gone or silent ({text}); {here}", -1)
        # Not those of the run: each pipeline counts its own ranks.
        what = f"failed at {where}: {text}" if where else f"is gone or silent ({text})"
        return PipelineError(f"pipeline rank {rank} {what}; {here}", rank, where)

    def _dead_peer(self) -> int:
        """Return the first rank whose connection in the control group is cut; -1 if there is none."""
        end = time.monotonic() + _NOTICE_S
        while self._control is not None and time.monotonic() < end:
            for peer in range(self.num_ranks):
                try:
                    if peer != self.rank:
                        self._control.recv([torch.empty(1)], peer, _PROBE_TAG)
                except RuntimeError:
                    return peer
            time.sleep(_NOTICE_S / 10)
        return -1

    def close(self) -> None:
        """Cut all connections, so that every rank that waits for this one fails at once."""
        self.closed = True
        close = getattr(self.transport, "close", None)
        if close is not None:
            close()
        self._control = None
        self.table.close()
        self.tied_groups.clear()


def default_device(pp_group: Group) -> torch.device:
    """Return the device of a rank whose stages have no tensors."""
    cuda = pp_group is not None and dist.get_backend(pp_group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
