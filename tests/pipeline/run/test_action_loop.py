"""Start here when a rank runs the wrong action or none, an evaluation runs others, or a kind is unknown."""

import dataclasses

import pytest
import torch
from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.pipeline import Action, PipelineExecutor, build_schedule, lower
from fused_megatron.pipeline.run.action_loop import ActionLoop, forward_only
from fused_megatron.pipeline.run.stage_compute import first_gradient
from fused_megatron.pipeline.schedule.action import Kind


def one_rank() -> PipelineExecutor:
    torch.manual_seed(0)
    return PipelineExecutor(
        build_schedule("1f1b", 1, 2), {0: nn.Linear(3, 1)}, pp_group=None, loss_fn=lambda y, target: (y - target).sum()
    )


def test_every_kind_has_a_method() -> None:
    assert set(ActionLoop._METHODS) == set(Kind)


def test_an_unknown_kind_raises(capfd: pytest.CaptureFixture[str]) -> None:
    executor = one_rank()
    actions = (*executor.schedule.actions[0], Action(0, "DREAM", 1))  # an action of a new kind
    executor.schedule = dataclasses.replace(executor.schedule, actions=(actions,))
    data = [torch.ones(4, 3)] * 2, [torch.ones(4, 1)] * 2
    with pytest.raises(NotImplementedError, match="0DREAM1: there is no method for kind='DREAM'"):
        executor.step(*data, loss_divisor=1)
    assert ">>0DREAM1<<" in capfd.readouterr().err


def test_gradients_are_divided_once() -> None:
    executor, x = one_rank(), torch.randn(4, 3)
    weight = next(iter(executor._stages.values())).module.weight
    executor.step([x, x], [torch.zeros(4, 1)] * 2, loss_divisor=8)
    torch.testing.assert_close(weight.grad, 2 * x.sum(0, keepdim=True) / 8)
    assert first_gradient(torch.tensor(3.0), 8) == 0.125


def test_an_evaluation_gathers_only_what_its_forwards_need() -> None:
    schedule = lower(build_schedule("looped_breadth_first", 1, 2, 2), max_unsharded=1)
    assert " ".join(map(str, forward_only(schedule.actions[0]))) == (
        "0UNSHARD 0F0 0F1 0RESHARD 1UNSHARD 1F0 1F1 1RESHARD"
    )
    assert "0UNSHARD 0B0" in " ".join(map(str, schedule.actions[0]))


def test_a_divisor_for_each_step_is_for_steps_that_overlap() -> None:
    with pytest.raises(
        InputError, match="loss_divisor has 2 numbers: one wanted, since the steps of 1f1b do not overlap"
    ):
        one_rank().step([torch.ones(4, 3)] * 4, [torch.ones(4, 1)] * 4, loss_divisor=[1.0, 2.0])
