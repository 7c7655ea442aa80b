"""Start here when a fault on one rank of a pipeline hangs the other ranks, or they report another cause."""

import json
import os
import signal
import time

import pytest
import torch
from torch import nn

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.pipeline import PipelineError, PipelineExecutor, build_schedule
from fused_megatron.pipeline.schedule.action import stages_of
from fused_megatron.testing.run_on_ranks import RankError, run_on_ranks

MICROBATCHES, WIDTH = 6, 4


class Stage(nn.Module):
    """Linear layer that fails on request."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls, self.fault = 0, lambda call, phase: None

    def forward(self, x):
        self.calls += 1
        call = self.calls
        self.fault(call, "forward")
        y = self.linear(x)
        if y.requires_grad:
            y.register_hook(lambda _: self.fault(call, "backward"))
        return y


def loss_fn(y, target):
    return (y - target).square().sum()


def make(pp_group, rank, ranks, name="1f1b", **options):
    schedule = build_schedule(name, ranks, MICROBATCHES)
    stages = {stage: Stage() for stage in stages_of(schedule.placement, rank)}
    return PipelineExecutor(schedule, stages, pp_group=pp_group, loss_fn=loss_fn, **options), stages


def data():
    return [torch.randn(2, WIDTH) for _ in range(MICROBATCHES)]


def raised(function):
    """Return (type, text, rank, action) of the error that function raises, and the seconds until then."""
    start = time.monotonic()
    try:
        function()
    except Exception as error:
        facts = type(error).__name__, str(error), getattr(error, "rank", None), getattr(error, "action", None)
        return *facts, time.monotonic() - start
    return None


def fail_in_actions(rank, world_size, cases):
    """Let one stage fail; then make a new pipeline, which works."""
    mesh = fm.init_mesh(pipeline_parallel_size=world_size)
    results = []
    for failing, at, phase, name in cases:
        executor, stages = make(mesh.pp_group, rank, world_size, name)
        executor.step(data(), data(), loss_divisor=1)

        def fault(call, where, at=at, phase=phase):
            if (call - MICROBATCHES, where) == (at + 1, phase):
                raise KeyError("the stage's own fault")

        if rank == failing:
            stages[min(stages)].fault = fault
        results.append(raised(lambda: executor.step(data(), data(), loss_divisor=1)))  # noqa: B023
        closed = raised(lambda: executor.step(data(), data(), loss_divisor=1))  # noqa: B023
        assert closed is not None and "closed" in closed[1]
    executor, _ = make(mesh.pp_group, rank, world_size)
    return results, executor.step(data(), data(), loss_divisor=1).item()


def test_exception_in_a_stage_reaches_all_ranks(capfd):
    cases = [
        (0, 3, "forward", "1f1b"),
        (1, 2, "backward", "1f1b"),
        (2, 4, "forward", "gpipe"),
        (1, 1, "backward", "zb_v"),
    ]
    answers = run_on_ranks(fail_in_actions, 3, cases)
    printed = capfd.readouterr().err
    for index, (failing, at, phase, name) in enumerate(cases):
        action = f"{failing}{'F' if phase == 'forward' else 'I' if name == 'zb_v' else 'B'}{at}"
        for rank, (results, _) in enumerate(answers):
            kind, text, named, where, seconds = results[index]
            assert seconds < 60, (rank, seconds)  # and not the timeout of the group
            if rank == failing:
                assert (kind, text) == ("KeyError", '"the stage\'s own fault"')
            else:
                assert (kind, named, where) == ("PipelineError", failing, action)
                assert f"rank {failing} failed at {action}: KeyError" in text and f"rank {rank} was at" in text
        assert printed.count(f"pipeline {name}, rank {failing}: {action} failed: KeyError") == 1
        assert printed.count(f">>{action}<<") == 1


def kill_one(rank, world_size, folder, victim, at):
    """Let the victim kill itself in its third forward or between two steps; the others write their errors and times."""
    mesh = fm.init_mesh(pipeline_parallel_size=world_size)
    executor, stages = make(mesh.pp_group, rank, world_size)

    def fault(call, phase):
        time.sleep(0.01)
        if rank == victim and call == at:
            die()

    def die():
        (folder / f"{rank}").write_text(json.dumps(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    stages[rank].fault = fault
    try:
        executor.step(data(), data(), loss_divisor=1)
        if rank == victim:
            die()
        executor.step(data(), data(), loss_divisor=1)
    except PipelineError as error:
        (folder / f"{rank}").write_text(json.dumps([time.time(), error.rank, str(error)]))
        raise


@pytest.mark.parametrize(("victim", "at"), [(1, 3), (3, 3), (2, None)])
def test_killed_rank_is_named_by_all_others(tmp_path, victim, at):
    with pytest.raises(RankError, match=f"rank {victim} died with exit code -9"):
        run_on_ranks(kill_one, 4, tmp_path, victim, at)
    died = json.loads((tmp_path / str(victim)).read_text())
    for rank in {0, 1, 2, 3} - {victim}:
        seen, named, text = json.loads((tmp_path / str(rank)).read_text())
        assert seen - died < 1
        assert named == victim
        assert f"rank {victim} is gone or silent" in text


def give_bad_input(rank, world_size):
    """Make errors at construction and before a step, each on one rank; the executor works afterwards."""
    mesh = fm.init_mesh(pipeline_parallel_size=world_size)
    group = mesh.pp_group
    schedule = build_schedule("1f1b", world_size, MICROBATCHES)
    tied_schedule = build_schedule("1f1b", world_size, MICROBATCHES, tied=((0, 1),))
    stage = Stage()

    def construct(given=schedule, stages=None, loss_fn=loss_fn, **options):
        return lambda: PipelineExecutor(given, stages or {rank: stage}, pp_group=group, loss_fn=loss_fn, **options)

    other = build_schedule(("1f1b", "gpipe")[rank], world_size, MICROBATCHES)
    torch.manual_seed(rank)
    errors = {
        "schedule": raised(construct(other)),
        "ranks": raised(construct(build_schedule("1f1b", 3, MICROBATCHES))),
        "stages": raised(construct(stages={rank: stage, 2: stage} if rank else None)),
        "loss_fn": raised(construct(loss_fn=None)),
        "update": raised(construct(build_schedule("pipedream", world_size, MICROBATCHES))),
        "tied": raised(construct(tied=[{}])),
        "tied values": raised(construct(tied_schedule, tied=[{rank: Stage().linear.weight}])),
        "tied parameter": raised(construct(tied_schedule, tied=[{rank: nn.Parameter(torch.zeros(1))}])),
        "module": raised(construct(stages={rank: "module"} if rank else None)),
    }
    torch.manual_seed(rank)
    stage = Stage()
    errors["tied values"] = raised(construct(tied_schedule, tied=[{rank: stage.linear.weight}]))
    executor = construct()()
    good = data()
    for name, arguments in {
        "inputs missing": (None, good),
        "inputs count": (good[1:], good),
        "inputs tensor": (torch.stack(good), good),
        "inputs type": ([1] * MICROBATCHES, good),
        "inputs device": ([x.to("meta") for x in good], good),
        "targets missing": (good, None),
        "targets count": (good, good[1:]),
    }.items():
        errors[name] = raised(lambda: executor.step(*arguments, loss_divisor=1))  # noqa: B023
    errors["divisor"] = raised(lambda: executor.evaluate(good, good, loss_divisor=0))
    kwargs = [{}] * (MICROBATCHES if rank == 0 else 1)
    errors["kwargs"] = raised(lambda: executor.step(good, good, loss_divisor=1, stage_kwargs=kwargs))
    return errors, executor.step(good, good, loss_divisor=1).item()


def test_bad_input_is_one_error_on_every_rank():
    (first, loss), (second, same_loss) = run_on_ranks(give_bad_input, 2)
    assert loss == same_loss > 0
    wanted = {
        "schedule": "must be the same on all ranks: rank 0 has 1f1b: 2 stages on 2 ranks, 6 microbatches (hash ",
        "ranks": "schedule 1f1b is for 3 ranks, and pp_group has 2",
        "stages": "stages=[1, 2] must be [1] on rank 1",
        "loss_fn": "loss_fn=None must be given on rank 1, of the last stage 1",
        "update": "update=None must be given for pipedream",
        "tied": "tied has 1 groups, and schedule.tied 0",
        "tied values": "tied[0]: the weight of rank 1 differs from the weight of rank 0",
        "tied parameter": "must be a parameter of stage",
        "module": "stages[1]=str must be an nn.Module",
        "inputs missing": "inputs=None must be given on this rank: one for each of 6 microbatches",
        "inputs count": "inputs has 5 items: one for each of 6 microbatches wanted",
        "inputs tensor": "inputs is a Tensor: a list wanted, one item for each microbatch (tensor.chunk(6))",
        "inputs type": "inputs[0] is a int: a tensor or tuple wanted",
        "inputs device": "inputs[0].device=meta must be cpu",
        "targets missing": "targets=None must be given",
        "targets count": "targets has 5 items",
        "divisor": "loss_divisor=0 must be a number above 0",
        "kwargs": "stage_kwargs has 1 items",
    }
    assert first.keys() == second.keys() == wanted.keys()
    for name, text in wanted.items():
        for errors in (first, second):
            assert errors[name] is not None, name
            assert errors[name][0] == "SharedInputError" and text in errors[name][1], (name, errors[name])


def test_one_rank_needs_no_group():
    with pytest.raises(InputError, match=r"stages=\[1\] must be \[0\]"):
        PipelineExecutor(build_schedule("1f1b", 1, 2), {1: Stage()}, pp_group=None, loss_fn=loss_fn)
    with pytest.raises(InputError, match="is for 2 ranks, and pp_group has 1"):
        PipelineExecutor(build_schedule("1f1b", 2, 2), {0: Stage()}, pp_group=None, loss_fn=loss_fn)
    executor = PipelineExecutor(build_schedule("1f1b", 1, 2), {0: Stage()}, pp_group=None, loss_fn=loss_fn)
    with pytest.raises(InputError, match="targets has 1 items"):
        executor.step(data()[:2], data()[:1], loss_divisor=1)
