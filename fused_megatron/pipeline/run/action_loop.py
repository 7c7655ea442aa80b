"""The loop that runs a rank's actions, whatever the schedule."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fused_megatron.checks import check
from fused_megatron.pipeline.run.faults import PeerLost, print_fault
from fused_megatron.pipeline.run.messages import Messages
from fused_megatron.pipeline.run.stage_compute import StageCompute
from fused_megatron.pipeline.run.stashed_weights import StashedWeights
from fused_megatron.pipeline.run.tied_weights import TiedWeight
from fused_megatron.pipeline.schedule.action import (
    BACKWARD,
    COMPUTE,
    FORWARD,
    INPUT_GRAD,
    RECEIVES,
    RECV_B,
    RECV_F,
    REDUCE_GRAD,
    REDUCE_TIED,
    SEND_B,
    SEND_F,
    SENDS,
    UPDATE,
    WEIGHT_GRAD,
    Action,
    Schedule,
)

ShapeIds = Callable[[], Sequence[int]]


class StepInputs(NamedTuple):
    """What a rank was given for a step, one item a microbatch; empty where the rank needs none."""

    inputs: Sequence[tuple[torch.Tensor, ...]]
    targets: Sequence[Any]
    kwargs: Sequence[Mapping[str, Any]]
    loss_divisor: float


class Hooks(NamedTuple):
    """What the caller gave to be called; see PipelineExecutor."""

    loss_fn: Callable[[Any, Any], torch.Tensor] | None
    reduce_gradients: Callable[[int], Callable[[], None] | None] | None
    update: Callable[[int, int], None] | None
    observe: Callable[[Action, float, float], None] | None


def receives_ahead(actions: Sequence[Action], lookahead: int) -> list[list[Action]]:
    """For each position the receives to post before it: those up to the computation that is `lookahead` after the
    position's own, or next, one."""
    computes = [position for position, action in enumerate(actions) if action.kind in COMPUTE]
    plan: list[list[Action]] = [[] for _ in actions]
    index, done = 0, 0
    for position in range(len(actions)):
        while index < len(computes) and computes[index] < position:
            index += 1
        last = index + lookahead
        limit = computes[last] if last < len(computes) else len(actions)
        plan[position] = [action for action in actions[done:limit] if action.kind in RECEIVES]
        done = max(done, limit)
    return plan


class ActionLoop:
    """The parts of one rank, and what is under way in a step.

    Args:
        schedule: lowered.
        rank: whose actions.
        stages, stashed: by stage; `stashed` is empty for synchronous schedules.
        tied: by group of schedule.tied.
        messages: to and from other ranks.
        hooks: of the caller.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        stages: Mapping[int, StageCompute],
        stashed: Mapping[int, StashedWeights],
        tied: Sequence[TiedWeight],
        messages: Messages,
        hooks: Hooks,
        lookahead: int,
    ) -> None:
        self._schedule, self._rank, self._last_stage = schedule, rank, schedule.num_stages - 1
        self._stages, self._stashed, self._tied = stages, stashed, tied
        self._messages, self._hooks = messages, hooks
        actions = schedule.actions[rank]
        forward = tuple(a for a in actions if a.kind in (FORWARD, SEND_F, RECV_F))
        self._plans = {
            training: (given, receives_ahead(given, lookahead))
            for training, given in ((True, actions), (False, forward))
        }
        # What computations left for the sends behind them; and for other stages of this rank, as if it were received.
        self._leaving: dict[Action, Sequence[torch.Tensor]] = {}
        self._handed: dict[Action, Sequence[torch.Tensor]] = {}
        self._reducing: dict[int, Callable[[], None] | None] = {}
        self._losses: dict[int, torch.Tensor] = {}
        self._versions: Mapping[int, StashedWeights] = {}
        self._shape_ids: ShapeIds = tuple
        self.at: Action | None = None  # where the run is, or failed

    def run(self, step: StepInputs, shape_ids: ShapeIds, training: bool) -> dict[int, torch.Tensor]:
        """All actions, or those of the forward alone; the loss sums of the microbatches that ended here.

        Args:
            step: what the rank was given.
            shape_ids: waits for those of the microbatches (step_table.py); called when a message first needs them.
            training: with backward.

        Raises:
            PeerLost: a message did not come or go. `at` says where.
            InputError: from shape_ids.
            Other errors of an action, once the schedule is printed with the action marked.
        """
        actions, plan = self._plans[training]
        messages, observe, self._losses, self._shape_ids = self._messages, self._hooks.observe, {}, shape_ids
        self._versions = self._stashed if training else {}
        for stashed in self._versions.values():
            stashed.begin()
        for position, action in enumerate(actions):
            self.at = action
            try:
                for receive in plan[position]:
                    messages.post(receive, shape_ids()[receive.microbatch or 0])
                given = self._given(action, step)
                start = time.perf_counter() if observe else 0.0
                self._do(action, given, step)
                del given  # before the next action waits
                if observe:
                    observe(action, start, time.perf_counter())
                messages.retire()
            except BaseException as error:
                if not isinstance(error, PeerLost) and not getattr(error, "on_every_rank", False):
                    print_fault(self._schedule, self._rank, action, error)
                raise
        self.at = None
        for stage in list(self._reducing):
            self._finish_reduction(stage)
        messages.finish()
        for stashed in self._versions.values():
            stashed.end()
        assert not self._handed, "every result has its use"
        losses, self._losses = self._losses, {}
        return losses

    def clear(self) -> None:
        """Forget a step that failed, and let go of what the tied weights' other ranks wait for."""
        self._messages.clear()
        self._handed.clear()
        self._leaving.clear()
        self._losses.clear()
        self._reducing.clear()
        for tied in self._tied:
            tied.close()
        for stage in self._stages.values():
            stage.clear()
        for stashed in self._versions.values():
            stashed.end()

    def _given(self, action: Action, step: StepInputs) -> Sequence[torch.Tensor]:
        """What a computation works on: from the caller, this rank, or (waiting for it) another one."""
        stage, kind, microbatch = action
        if kind not in (FORWARD, BACKWARD, INPUT_GRAD) or microbatch is None:
            return ()
        if kind == FORWARD and stage == 0:
            return step.inputs[microbatch]
        if kind != FORWARD and stage == self._last_stage:
            loss = self._losses[microbatch]
            return (torch.ones_like(loss) / step.loss_divisor,)
        receive = Action(stage, RECV_F if kind == FORWARD else RECV_B, microbatch)
        handed = self._handed.pop(receive, None)
        return self._messages.take(receive) if handed is None else handed

    def _do(self, action: Action, given: Sequence[torch.Tensor], step: StepInputs) -> None:
        stage, kind, microbatch = action
        if kind in COMPUTE and microbatch is not None and stage in self._versions:
            self._versions[stage].use(microbatch)
        if kind == FORWARD and microbatch is not None:
            self._forward(stage, microbatch, given, step)
        elif kind in (BACKWARD, INPUT_GRAD) and microbatch is not None:
            gradients = self._stages[stage].backward(
                microbatch, given, split=kind == INPUT_GRAD, loss_divisor=step.loss_divisor
            )
            if stage:
                self._hand(Action(stage, SEND_B, microbatch), gradients)
        elif kind == WEIGHT_GRAD and microbatch is not None:
            self._stages[stage].weight_grad(microbatch)
        elif kind in SENDS:
            self._messages.send(action, self._leaving.pop(action), self._shape_ids()[microbatch or 0])
        elif kind == REDUCE_GRAD:
            reduce = self._hooks.reduce_gradients
            self._reducing[stage] = reduce(stage) if reduce else None
        elif kind == REDUCE_TIED and microbatch is not None:
            for other in self._schedule.tied[microbatch]:
                self._finish_reduction(other)
            self._tied[microbatch].reduce()
        elif kind == UPDATE and microbatch is not None:
            self._finish_reduction(stage)
            update = self._hooks.update
            assert update is not None
            self._versions[stage].update(lambda: update(stage, microbatch))

    def _forward(self, stage: int, microbatch: int, given: Sequence[Any], step: StepInputs) -> None:
        loss = None
        if stage == self._last_stage:
            loss_fn, target = self._hooks.loss_fn, step.targets[microbatch]
            assert loss_fn is not None
            loss = lambda output: loss_fn(output, target)  # noqa: E731
        kwargs = step.kwargs[microbatch] if step.kwargs else {}
        outputs = self._stages[stage].forward(microbatch, tuple(given), kwargs, loss)
        if loss is None:
            self._hand(Action(stage, SEND_F, microbatch), outputs)
            return
        given_loss = outputs[0]
        check(
            len(outputs) == 1 and given_loss.ndim == 0,
            f"loss_fn returned {len(outputs)} tensor(s) of {given_loss.ndim} dims: one of none wanted, the sum of the "
            "microbatch's losses",
        )
        self._losses[microbatch] = given_loss.detach()

    def _hand(self, send: Action, tensors: Sequence[torch.Tensor]) -> None:
        """To the send behind this computation, or to the neighbour stage where that is on this rank, too."""
        stage, kind, microbatch = send
        neighbour, receive = (stage + 1, RECV_F) if kind == SEND_F else (stage - 1, RECV_B)
        if self._schedule.placement[neighbour] != self._rank:
            self._leaving[send] = tensors
        elif kind == SEND_F:  # a leaf of its own: each stage has its own graph
            leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
            self._handed[Action(neighbour, receive, microbatch)] = leaves
        else:
            self._handed[Action(neighbour, receive, microbatch)] = tensors

    def _finish_reduction(self, stage: int) -> None:
        wait = self._reducing.pop(stage, None)
        if wait is not None:
            wait()
