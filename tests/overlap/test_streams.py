"""Start here when two streams of an overlapped product touch the same memory without an event, or the host waits."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_megatron.checks import InputError
from fused_megatron.collectives.transfers import Transfer
from fused_megatron.overlap import ChunkChoice, ColumnLinearFunction, MLPFunction, RowLinearFunction, overlap_costs
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
    """Run forward and backward; inputs are made, and results are read, on the current stream."""
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
    """Find a buffer that is freed before the wait, since no one holds it."""

    def forgetful(self, works, buffers, result=lambda buffer: buffer):
        self._works, self._buffers, self._result = works, buffers[:1], result

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


class OnTheDevice(TorchDispatchMode):
    """Refuse ops that give the host a value or move data off the device: a CUDA graph cannot capture them."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            assert not isinstance(x, torch.Tensor) or x.device.type == "meta", f"{func} on the host"
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.rows.append(next(x.shape[0] for x in args if isinstance(x, torch.Tensor) and x.dim() == 2))
        return out


def forbidden(*args, **kwargs):
    raise AssertionError("the host waits")


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_cuda_graph_can_capture_a_step(group, sequence_parallel, monkeypatch):
    """Run forward and backward on a device without values: no host synchronisation, and products of whole tiles."""
    for name in ("synchronize", "current_stream", "Event", "Stream"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    rows, dim = (512, 0) if sequence_parallel else (2048, None)
    make = lambda *shape: torch.empty(shape, device="meta", requires_grad=True)  # noqa: E731
    with OnTheDevice() as ops:
        x, up, down, bias = make(rows, 1, 64), make(192, 64), make(64, 192), make(192)
        h = ColumnLinearFunction.apply(x, up, bias, dim, group, ChunkChoice(3))
        RowLinearFunction.apply(h, down, None, dim, group, ChunkChoice(3)).sum().backward()
        y = MLPFunction.apply(
            x, up, bias, down, None, _ACTIVATIONS["gelu"][1], sequence_parallel, group, ChunkChoice(3)
        )
        y.sum().backward()
    # Weight gradients have the weight's rows; every other product has whole tiles of 128.
    assert {rows for rows in ops.rows if rows % 128} == {64, 192} and len(ops.rows) > 20


def test_a_group_is_not_measured_within_a_capture(group, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(InputError, match="run a step before the capture, or pass a number of chunks"):
        overlap_costs(group, torch.float32, torch.device("cuda"))
