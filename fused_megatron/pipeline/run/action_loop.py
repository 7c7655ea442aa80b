"""Loop that runs a rank's actions, the same for every schedule."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import torch

from fused_megatron.checks import SharedError, check
from fused_megatron.collectives.transport.host_ring import LostPeerError
from fused_megatron.pipeline.run.faults import PeerLost, print_fault
from fused_megatron.pipeline.run.messages import Messages
from fused_megatron.pipeline.run.stage_compute import StageCompute, first_gradient
from fused_megatron.pipeline.run.stage_hooks import StageHooks, Wait
from fused_megatron.pipeline.run.stashed_weights import StashedWeights
from fused_megatron.pipeline.run.tied_weights import TiedWeight
from fused_megatron.pipeline.schedule.action import COMPUTE, RECEIVES, Action, Kind, Schedule
from fused_megatron.pipeline.schedule.routing import input_of, output_of, peer

ShapeIds = Callable[[], Sequence[int]]
Tensors = Sequence[Any]
"""Tensors; a gradient may be None."""

Around = Callable[[Action], AbstractContextManager[object]]
"""Context for each action of a rank."""


class StepInputs(NamedTuple):
    """Inputs of a step on one rank, one item for each microbatch; empty if the rank needs none."""

    inputs: Sequence[tuple[torch.Tensor, ...]]
    targets: Sequence[Any]
    kwargs: Sequence[Mapping[str, Any]]
    loss_divisors: tuple[float, ...]
    """Divisor of each of the steps of a call, which have equally many microbatches."""
    num_microbatches: int
    """Of all steps."""

    def loss_divisor(self, microbatch: int) -> float:
        """Return the divisor of the step of a microbatch."""
        return self.loss_divisors[microbatch * len(self.loss_divisors) // self.num_microbatches]


_NO_STEP = StepInputs((), (), (), (1.0,), 1)


def receives_ahead(actions: Sequence[Action], lookahead: int) -> list[list[Action]]:
    """Return for each position the receives to post before it.

    These are all receives up to the computation that is `lookahead` computations after the one at the position, or the
    next one.
    """
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


def forward_only(actions: Sequence[Action]) -> tuple[Action, ...]:
    """Return the actions of an evaluation: forwards, their messages, and UNSHARD and RESHARD around forwards."""
    unshards: dict[int, int] = {}
    needed: set[int] = set()
    for position, action in enumerate(actions):
        if action.kind == Kind.UNSHARD:
            unshards[action.stage] = position
        elif action.kind == Kind.FORWARD and action.stage in unshards:
            needed.add(unshards[action.stage])
        elif action.kind == Kind.RESHARD and unshards[action.stage] in needed:
            needed.add(position)
    kinds = (Kind.FORWARD, Kind.SEND_F, Kind.RECV_F)
    return tuple(action for position, action in enumerate(actions) if action.kind in kinds or position in needed)


class ActionLoop:
    """Loop over the actions of one rank, and the state of a step under way.

    Args:
        schedule: the lowered schedule.
        rank: the rank whose actions run.
        stages: the rank's stages, by index.
        stashed: versions of the weights, by stage; empty for synchronous schedules.
        tied: the tied weights, one for each group of schedule.tied.
        messages: messages to and from other ranks.
        hooks, observe: see PipelineExecutor.
        lookahead: number of computations by which a receive is posted before its use.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        stages: Mapping[int, StageCompute],
        stashed: Mapping[int, StashedWeights],
        tied: Sequence[TiedWeight],
        messages: Messages,
        hooks: StageHooks,
        observe: Callable[[Action, float, float], None] | None,
        lookahead: int,
    ) -> None:
        self._schedule = schedule
        self._rank = rank
        self._last_stage = schedule.num_stages - 1
        self._stages = stages
        self._stashed = stashed
        self._tied = tied
        self._messages = messages
        self._hooks = hooks
        self._observe = observe
        self._lookahead = lookahead
        self._plans: dict[tuple[int, bool], tuple[Sequence[Action], list[list[Action]]]] = {}
        # Results of computations by the action that takes them: the send, or, if the next stage is on this rank, the
        # receive that it would have otherwise.
        self._results: dict[Action, Tensors] = {}
        # Waits for reductions and unshards that were started, by kind and stage.
        self._waits: dict[tuple[Kind, int], Wait] = {}
        self._losses: dict[int, torch.Tensor] = {}
        self._versions: Mapping[int, StashedWeights] = {}
        self._step = _NO_STEP
        self._shape_ids: ShapeIds = tuple
        self.around: Around | None = None
        self.current_action: Action | None = None  # the action that runs, or failed

    def run(self, step: StepInputs, shape_ids: ShapeIds, training: bool, schedule: Schedule) -> dict[int, torch.Tensor]:
        """Run all actions, or only the forwards; return the loss sums of the microbatches whose last stage is here.

        Args:
            step: the inputs of this rank.
            shape_ids: waits for the shape ids of the microbatches (step_table.py); called when a message first needs
                one.
            training: whether backwards run.
            schedule: the lowered schedule, or the same with another number of steps.

        Raises:
            PeerLost: a message failed, in the action current_action.
            InputError: raised by shape_ids.
            Any error of an action, after the schedule is printed with the action marked.
        """
        self._schedule = schedule
        actions, plan = self._plan(training)
        messages, observe = self._messages, self._observe
        self._step, self._shape_ids, self._losses = step, shape_ids, {}
        self._versions = self._stashed if training else {}
        for stashed in self._versions.values():
            stashed.begin()
        for position, action in enumerate(actions):
            self.current_action = action
            try:
                for receive in plan[position]:
                    messages.post(receive, shape_ids()[receive.microbatch])
                operands = self._operands(action)
                start = time.perf_counter() if observe else 0.0
                if self.around is None:
                    self._perform(action, operands)
                else:
                    with self.around(action):
                        self._perform(action, operands)
                del operands  # before the next action waits
                if observe:
                    observe(action, start, time.perf_counter())
                messages.retire()
            except BaseException as error:
                if not isinstance(error, PeerLost | LostPeerError | SharedError):
                    print_fault(self._schedule, self._rank, action, error)
                raise
        self.current_action = None
        for kind, stage in list(self._waits):
            self._wait_for(kind, stage)
        messages.finish()
        for stashed in self._versions.values():
            stashed.end()
        assert not self._results, "every result has its use"
        losses, self._losses = self._losses, {}
        self._step = _NO_STEP
        return losses

    def _plan(self, training: bool) -> tuple[Sequence[Action], list[list[Action]]]:
        """Return the actions of this rank, and the receives to post before each."""
        key = self._schedule.num_steps, training
        if key not in self._plans:
            actions = self._schedule.actions[self._rank]
            chosen = actions if training else forward_only(actions)
            self._plans[key] = chosen, receives_ahead(chosen, self._lookahead)
        return self._plans[key]

    def clear(self) -> None:
        """Forget a step that failed, and close the groups of tied weights, so that their other ranks do not wait."""
        self._messages.clear()
        self._results.clear()
        self._losses.clear()
        self._step = _NO_STEP
        self._waits.clear()
        for tied in self._tied:
            tied.close()
        for stage in self._stages.values():
            stage.clear()
        for stashed in self._versions.values():
            stashed.end()

    def _operands(self, action: Action) -> Tensors:
        """Return the operands of a computation: from the caller, from this rank, or received from another rank."""
        if action.kind not in COMPUTE:
            return ()
        self._wait_for(Kind.UNSHARD, action.stage)
        if action.kind == Kind.WEIGHT_GRAD:
            return ()
        if action.kind == Kind.FORWARD and action.stage == 0:
            return self._step.inputs[action.microbatch]
        if action.kind != Kind.FORWARD and action.stage == self._last_stage:
            return (first_gradient(self._losses[action.microbatch], self._step.loss_divisor(action.microbatch)),)
        receive = input_of(action)
        local = self._results.pop(receive, None)
        return self._messages.take(receive) if local is None else local

    def _perform(self, action: Action, operands: Tensors) -> None:
        method = self._METHODS.get(action.kind)
        if method is None:
            raise NotImplementedError(f"{action}: there is no method for kind={action.kind!r}")
        if action.kind in COMPUTE and action.stage in self._versions:
            self._versions[action.stage].use(action.microbatch)
        method(self, action, operands)

    def _forward(self, action: Action, operands: Tensors) -> None:
        microbatch, is_last = action.microbatch, action.stage == self._last_stage
        kwargs = self._step.kwargs[microbatch] if self._step.kwargs else {}
        target = self._step.targets[microbatch] if is_last else None
        outputs = self._stages[action.stage].forward(microbatch, tuple(operands), kwargs, target)
        if not is_last:
            self._pass_on(action, outputs)
            return
        loss = outputs[0]
        check(
            len(outputs) == 1 and loss.ndim == 0,
            f"loss_fn returned {len(outputs)} tensor(s) of {loss.ndim} dims: one of none wanted, the sum of the "
            "microbatch's losses",
        )
        self._losses[microbatch] = loss.detach().clone()

    def _backward(self, action: Action, operands: Tensors) -> None:
        split = action.kind == Kind.INPUT_GRAD
        gradients = self._stages[action.stage].backward(
            action.microbatch, operands, split=split, loss_divisor=self._step.loss_divisor(action.microbatch)
        )
        if action.stage > 0:
            self._pass_on(action, gradients)

    def _weight_grad(self, action: Action, _: Tensors) -> None:
        self._stages[action.stage].weight_grad(action.microbatch)

    def _send(self, action: Action, _: Tensors) -> None:
        self._messages.send(action, self._results.pop(action), self._shape_ids()[action.microbatch])

    def _receive(self, action: Action, _: Tensors) -> None:
        """Do nothing: run() posts receives ahead, and the computation takes the message."""

    def _reduce(self, action: Action, _: Tensors) -> None:
        self._start(action, self._hooks.reduce(action.stage))

    def _reduce_tied(self, action: Action, _: Tensors) -> None:
        for stage in self._schedule.tied[action.tied_group]:
            self._wait_for(Kind.REDUCE_GRAD, stage)
        self._tied[action.tied_group].reduce()

    def _update(self, action: Action, _: Tensors) -> None:
        self._wait_for(Kind.REDUCE_GRAD, action.stage)
        self._versions[action.stage].update(lambda: self._hooks.update(action.stage, action.update))

    def _unshard(self, action: Action, _: Tensors) -> None:
        self._start(action, self._hooks.unshard(action.stage))

    def _reshard(self, action: Action, _: Tensors) -> None:
        self._wait_for(Kind.UNSHARD, action.stage)
        self._hooks.reshard(action.stage)

    _METHODS: ClassVar[dict[Kind, Callable[["ActionLoop", Action, Tensors], None]]] = {
        Kind.FORWARD: _forward,
        Kind.BACKWARD: _backward,
        Kind.INPUT_GRAD: _backward,
        Kind.WEIGHT_GRAD: _weight_grad,
        Kind.SEND_F: _send,
        Kind.SEND_B: _send,
        Kind.RECV_F: _receive,
        Kind.RECV_B: _receive,
        Kind.REDUCE_GRAD: _reduce,
        Kind.REDUCE_TIED: _reduce_tied,
        Kind.UPDATE: _update,
        Kind.UNSHARD: _unshard,
        Kind.RESHARD: _reshard,
    }

    def _pass_on(self, made_by: Action, tensors: Tensors) -> None:
        """Pass the result of a computation to its send, or to the next stage if that is on this rank."""
        send = output_of(made_by)
        receive = peer(send)
        if made_by.kind == Kind.FORWARD:
            # The tensors become leaves, since each stage has its own graph. They are copied, since a stage may return a
            # buffer that its next microbatch overwrites before it is read (a CUDA graph does). Autograd itself copies
            # such gradients.
            tensors = [
                t.detach().clone(memory_format=torch.contiguous_format).requires_grad_(t.requires_grad) for t in tensors
            ]
        self._results[receive if self._schedule.placement[receive.stage] == self._rank else send] = tensors

    def _start(self, action: Action, wait: Wait | None) -> None:
        if wait is not None:
            self._waits[action.kind, action.stage] = wait

    def _wait_for(self, kind: Kind, stage: int) -> None:
        wait = self._waits.pop((kind, stage), None)
        if wait is not None:
            wait()
