"""Start here when stages receive other tensors than were sent (tuples, masks, views, none), or keep them too long."""

import weakref

import pytest
import torch
from torch import nn

import fused_megatron as fm
from fused_megatron.pipeline import PipelineExecutor, build_schedule
from fused_megatron.pipeline.run.messages import _decode, encode_header, spec_of
from fused_megatron.pipeline.schedule.action import peak_live_activations, stages_of
from fused_megatron.tensor_parallel import ColumnParallelLinear
from fused_megatron.testing.run_on_ranks import run_on_ranks

WIDTH, STAGES = 4, 6


class Stage(nn.Module):
    """One of six stages that return every kind of result that a pipeline can send."""

    def __init__(self, index):
        super().__init__()
        self.index = index
        self.linear = nn.Linear(WIDTH, WIDTH) if index not in (1, 3) else None

    def forward(self, x, *rest, scale):
        if self.index == 0:  # a number for each row, a mask, half precision, and an unused tensor
            y = self.linear(x)
            ids, mask = torch.arange(len(x)), x[:, 0] > 0
            return y, ids, mask, y.to(torch.bfloat16), y * 2
        if self.index == 1:  # its unchanged inputs, which are leaves of this stage
            return (x, *rest)
        y = x if self.linear is None else self.linear(x) * scale
        if self.index == STAGES - 1:
            return y
        ids, mask, half, _ = rest if len(rest) == 4 else (*rest, None)
        if self.index == 2:  # a view, not contiguous
            return y.t(), ids, mask, half
        if self.index == 3:
            return y.t(), ids, mask, half[:0]
        return torch.where(mask.unsqueeze(1), y, y * ids.unsqueeze(1)), half


class Chain(nn.Module):
    """Run the stages in one process."""

    def __init__(self, stages):
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x, **kwargs):
        for stage in self.stages:
            x = stage(*x, **kwargs) if isinstance(x, tuple) else stage(x, **kwargs)
        return x


def make_stages():
    torch.manual_seed(3)
    stages = [Stage(index) for index in range(STAGES)]
    stages[0].linear.weight.requires_grad_(False)
    return stages


def loss_fn(y, target):
    return (y - target).square().sum()


def data(count):
    generator = torch.Generator().manual_seed(1)
    # One microbatch has no rows at all.
    rows = [(0 if index == 2 else 1 + index % 3) for index in range(count)]
    pairs = [torch.randn(2, n, WIDTH, generator=generator) for n in rows]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs], [{"scale": 1 + 0.5 * i} for i in range(count)]


def gradients(stages):
    return {f"{i}.{n}": p.grad for i, stage in stages.items() for n, p in stage.named_parameters()}


def pass_everything(rank, world_size):
    mesh = fm.init_mesh(pipeline_parallel_size=world_size)
    results = {}
    inputs, targets, kwargs = data(5)
    for name in ("interleaved_1f1b", "zb_v", "looped_breadth_first"):
        schedule = build_schedule(name, world_size, 5, 2)
        stages = {i: stage for i, stage in enumerate(make_stages()) if i in stages_of(schedule.placement, rank)}
        executor = PipelineExecutor(schedule, stages, pp_group=mesh.pp_group, loss_fn=loss_fn)
        for _ in range(2):  # with headers, and without
            loss = executor.step(inputs, targets, loss_divisor=3, stage_kwargs=kwargs)
        evaluated = executor.evaluate(inputs, targets, loss_divisor=3, stage_kwargs=kwargs)
        results[name] = loss, evaluated, executor.microbatch_losses, gradients(stages)
    return results


def test_tuples_masks_views_and_empty_microbatches():
    answers = run_on_ranks(pass_everything, 3)
    stages = make_stages()
    model = Chain(stages)
    inputs, targets, kwargs = data(5)
    losses = torch.zeros(5, dtype=torch.float64)
    for _ in range(2):
        for index, (x, target, options) in enumerate(zip(inputs, targets, kwargs, strict=True)):
            loss = loss_fn(model(x, **options), target)
            losses[index] = loss.item()
            (loss / 3).backward()
    expected = gradients(dict(enumerate(stages)))
    for results in answers:
        for loss, evaluated, microbatch_losses, mine in results.values():
            torch.testing.assert_close(microbatch_losses, losses, rtol=1e-6, atol=0)
            assert loss == evaluated and loss.dtype == torch.float64 and loss.shape == ()
            torch.testing.assert_close(loss, losses.sum() / 3, rtol=1e-6, atol=0)
            for key, gradient in mine.items():
                if expected[key] is None:
                    assert gradient is None
                else:
                    torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-6)


class Watched(nn.Module):
    """Layer that keeps weak references to its inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.linear = ColumnParallelLinear(WIDTH, WIDTH, tp_group=None)
        self.inputs, self.outputs = [], []

    def forward(self, x):
        y = self.linear(x)
        self.inputs.append(weakref.ref(x))
        self.outputs.append(weakref.ref(y))
        return y


def watch_memory(rank, world_size):
    """Return for each schedule the tensors that live too long, and the most live activations."""
    mesh = fm.init_mesh(pipeline_parallel_size=world_size)
    found = {}
    x = [torch.randn(3, WIDTH) for _ in range(8)]
    for name in ("gpipe", "1f1b", "zb_h1", "v_half"):
        schedule = build_schedule(name, world_size, 8)
        stages = {stage: Watched() for stage in stages_of(schedule.placement, rank)}
        wrong, live, products = [], [], []

        def observe(action, start, end, stages=stages, wrong=wrong, live=live, products=products):
            watched, m = stages[action.stage], action.index
            live.append(executor.num_live)  # noqa: B023
            weight = watched.linear.weight
            if action.kind in "IW" and m == 0:
                products.append((action.kind, weight.grad is not None))
            # The last output is under way or with its receiver; the output of two microbatches ago must be freed.
            if action.kind in "BI" and m >= 2 and watched.outputs[m - 2]() is not None:
                wrong.append(f"output {m - 2} of stage {action.stage} lives at {action}")
            if action.kind in "BW" and action.stage and m >= 1 and watched.inputs[m - 1]() is not None:
                wrong.append(f"input {m - 1} of stage {action.stage} lives at {action}")

        executor = PipelineExecutor(schedule, stages, pp_group=mesh.pp_group, loss_fn=loss_fn, observe=observe)
        executor.step(x, x, loss_divisor=1)
        if max(live) != peak_live_activations(schedule)[rank]:
            wrong.append(f"{max(live)} live activations")
        if any(done != (kind == "W") for kind, done in products):
            wrong.append(f"weight gradients are not put off: {products}")
        found[name] = wrong, len(products)
        executor.close()
    return found


def test_outputs_are_freed_once_sent_and_weight_gradients_wait_for_w():
    for rank, found in enumerate(run_on_ranks(watch_memory, 2)):
        for name, (wrong, products) in found.items():
            assert not wrong, (rank, name, wrong)
            assert (products > 0) == (name in ("zb_h1", "v_half"))


class Unsteady(nn.Module):
    """Stage whose output shape depends on more than the shape of its input."""

    def __init__(self, fault):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.fault, self.calls = fault, 0

    def forward(self, x):
        self.calls += 1
        y = x * self.weight
        if self.fault == "shape":
            return y[: self.calls]
        return {"list": [y], "many": (y,) * 40, "dims": (y.view(*[1] * 130, *y.shape),)}[self.fault]


def send_what_cannot_be(rank, world_size):
    mesh = fm.init_mesh(pipeline_parallel_size=world_size)
    texts = []
    x = [torch.ones(3, WIDTH)] * 3
    for fault in ("shape", "list", "many"):
        stage = Unsteady(fault) if rank == 0 else nn.Linear(WIDTH, WIDTH)
        schedule = build_schedule("1f1b", 2, 3)
        executor = PipelineExecutor(schedule, {rank: stage}, pp_group=mesh.pp_group, loss_fn=loss_fn)
        try:
            executor.step(x, x, loss_divisor=1)
        except Exception as error:
            texts.append(str(error))
    return texts


def test_what_cannot_be_sent_is_said_on_every_rank():
    wanted = [
        "stage 0 returned float32[2, 4] for microbatch 1, and float32[1, 4] for an input of the same shapes before",
        "a stage returned list: it must return a tensor or a tuple of tensors",
        "a stage returned 40 tensors, more than fit a header",
    ]
    answers = run_on_ranks(send_what_cannot_be, 2)
    for texts in answers:
        assert len(texts) == len(wanted)
        for text, part in zip(texts, wanted, strict=True):
            assert part in text


def test_header_holds_every_dtype_and_shape():
    tensors = [torch.zeros(2, 0, 5, dtype=torch.bool), torch.zeros((), requires_grad=True)]
    tensors += [torch.zeros(3, dtype=dtype) for dtype in (torch.bfloat16, torch.int64, torch.complex64)]
    specs = tuple(spec_of(tensor) for tensor in tensors)
    assert _decode(encode_header(specs)) == specs
    assert _decode(encode_header(())) == ()
    with pytest.raises(TypeError, match="cannot be sent"):
        encode_header((spec_of(torch.zeros(1, dtype=torch.float8_e4m3fn)),))
