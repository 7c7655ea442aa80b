"""No two accesses of an overlapped product to the same memory without an event between them, and no host sync."""

import types

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from fused_megatron.collectives import ChunkChoice, overlapped_linear, overlapped_mlp
from fused_megatron.collectives.streams import Transfer
from fused_megatron.tensor_parallel import (
    column_parallel_linear,
    parallel_mlp,
    row_parallel_linear,
    vocab_parallel_linear_cross_entropy,
)
from fused_megatron.tensor_parallel.mlp import _ACTIVATIONS
from fused_megatron.testing.recorded_streams import RecordedStreams

RANKS, S, H, FFN = 4, 24, 8, 20


@pytest.fixture
def group():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=RANKS)
    yield dist.group.WORLD
    dist.destroy_process_group()


def linear_layers(x, up, down, **options):
    h = column_parallel_linear(x, up, up[:, 0].detach().requires_grad_(), **options)
    return row_parallel_linear(torch.tanh(h), down, None, **options)


def mlp(x, up, down, **options):
    return parallel_mlp(x, up, up[:, 0].detach().requires_grad_(), down, None, **options)


def loss(x, up, down, *, overlap, **options):
    target = torch.zeros(x.shape[0] * (RANKS if options["sequence_parallel"] else 1), 1, dtype=torch.int64)
    return vocab_parallel_linear_cross_entropy(x, up, target, vocab_size=FFN * RANKS, **options)


def step(function, group, sequence_parallel, overlap, streams):
    """Forward and backward, whose inputs are made and whose results are read on the current stream."""
    with streams:
        x = torch.rand(S // RANKS if sequence_parallel else S, 1, H).requires_grad_()
        up, down = torch.rand(FFN, H).requires_grad_(), torch.rand(H, FFN).requires_grad_()
        y = function(x, up, down, tp_group=group, sequence_parallel=sequence_parallel, overlap=overlap)
        y.square().sum().backward()
        for t in (x, up, down):
            if t.grad is not None:
                t.grad.sum()
    return streams


@pytest.mark.parametrize("function", [linear_layers, mlp, loss])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("overlap", [False, 3])
def test_every_wait_is_there_and_needed(group, function, sequence_parallel, overlap):
    arguments = function, group, sequence_parallel, overlap
    whole = step(*arguments, RecordedStreams())
    assert whole.races == [] and whole.under_way == set() and whole.num_collectives > 0
    for i in range(whole.num_collectives):
        assert step(*arguments, RecordedStreams(without_wait=[i])).races, f"nobody reads what collective {i} brings"
        assert step(*arguments, RecordedStreams(without_start=[i])).races, f"nothing was written for collective {i}"


def test_transfers_own_their_buffers(group, monkeypatch):
    """What nobody holds until the wait is given back early: seen."""

    def forgetful(self, work, buffers, result=lambda buffer: buffer):
        self._work, self._buffers, self._result = work, buffers[:1], result

    monkeypatch.setattr(Transfer, "__init__", forgetful)
    races = step(linear_layers, group, True, 3, RecordedStreams()).races
    assert any("given back before" in race for race in races)


def test_a_race_is_named(group):
    with RecordedStreams() as streams:
        x = torch.ones(4)
        work = dist.all_reduce(x, group=group, async_op=True)
        x + 1
        work.wait()
        x + 1
        other = x[2:]
        work = dist.all_reduce(other, group=group, async_op=True)
        x[:2].add_(1)  # other bytes of the same memory
        other.view(1, 2).add_(1)
    assert streams.under_way == {1}
    assert streams.races == [
        "add reads what all_reduce 0 wrote, and no event orders the two",
        "add_ writes what all_reduce 1 wrote, and no event orders the two",
    ]


class OnTheDevice(torch.utils._python_dispatch.TorchDispatchMode):
    """No op of a step may give the host a value or move one off the device: neither can be captured in a CUDA graph."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            assert not isinstance(x, torch.Tensor) or x.device.type == "cuda", f"{func} on the host"
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.products.append(next(x.shape[0] for x in args if isinstance(x, torch.Tensor) and x.dim() == 2))
        return out


class Slices(torch.overrides.TorchFunctionMode):
    """Indexing of fake CUDA tensors, which a CPU build of torch refuses."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            return self.view(*args)
        if func is torch.Tensor.__setitem__:
            return self.view(*args[:2]).copy_(args[2])
        return func(*args, **(kwargs or {}))

    def view(self, x, index):
        dim = 0
        for i in index if isinstance(index, tuple) else (index,):
            begin, end = (i, i + 1) if isinstance(i, int) else i.indices(x.shape[dim])[:2]
            x = x.narrow(dim, begin, end - begin)
            x, dim = (x.squeeze(dim), dim) if isinstance(i, int) else (x, dim + 1)
        return x


def forbidden(*args, **kwargs):
    raise AssertionError("the host waits")


@pytest.mark.parametrize("sequence_dim", [None, 0])
def test_what_a_gpu_is_given_can_be_captured(group, sequence_dim, monkeypatch):
    """Fake CUDA tensors through forward and backward: no host sync, and products of whole tiles of 128 rows."""
    for name in ("synchronize", "current_stream", "Event", "Stream"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    ranks = 1 if sequence_dim is None else RANKS
    needs = (True,) * 8
    with FakeTensorMode(), Slices(), OnTheDevice() as ops:
        make = lambda *shape: torch.empty(shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        x, up, down, bias = make(2048 // ranks, 1, 64), make(256, 64), make(64, 256), make(256)
        dy = make(2048 // ranks, 1, 64)
        for function, inputs, upstream in (
            (overlapped_linear._ColumnLinear, (x, up, bias, sequence_dim, group, ChunkChoice(4)), make(2048, 1, 256)),
            (overlapped_linear._RowLinear, (make(2048, 1, 256), down, None, sequence_dim, group, ChunkChoice(4)), dy),
            (
                overlapped_mlp._MLP,
                (x, up, bias, down, None, _ACTIVATIONS["gelu"][1], sequence_dim == 0, group, ChunkChoice(4)),
                dy,
            ),
        ):
            saved = types.SimpleNamespace(needs_input_grad=(*needs[:2], inputs[2] is not None, *needs[3:]))
            saved.save_for_backward = lambda *tensors, saved=saved: setattr(saved, "saved_tensors", tensors)
            function.forward(saved, *inputs)
            function.backward(saved, upstream)
    # Weight gradients have the weight's rows; every other product whole tiles.
    assert all(rows % 128 == 0 or rows in (64, 256) for rows in ops.products) and len(ops.products) > 20
