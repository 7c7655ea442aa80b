"""Start here when a layer norm under sequence parallelism has partial gradients."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fused_megatron import tensor_parallel
from fused_megatron.checks import InputError
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.tensor_parallel import SequenceParallelLayerNorm, parameter_shard
from fused_megatron.testing import assert_close, run_cases_on_ranks, run_on_ranks

S, B, H = 12, 3, 17


def norm_case(rank, ranks, sequence_parallel, bias, dtype):
    generator = torch.Generator().manual_seed(2)
    x, dy = (torch.randn(S, B, H, generator=generator).to(dtype) for _ in range(2))
    w, b = (torch.randn(H, generator=generator).to(dtype) for _ in range(2))
    layer = SequenceParallelLayerNorm(
        H, 1e-3, bias, tp_group=dist.group.WORLD, sequence_parallel=sequence_parallel, dtype=dtype
    )
    with torch.no_grad():
        layer.weight.copy_(w)
        if bias:
            layer.bias.copy_(b)

    def by_torch(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in ((x, w, b) if bias else (x, w))]
        y = F.layer_norm(leaves[0], (H,), *leaves[1:], eps=1e-3)
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))

    own = (lambda t: t.chunk(ranks)[rank]) if sequence_parallel else (lambda t: t)
    shards = [own, own, lambda t: t, lambda t: t]
    x_local = own(x).clone().requires_grad_()
    y = layer(x_local)
    with record_communication() as seen:
        y.backward(own(dy))
    assert seen.counts == ({"all_reduce": 1} if sequence_parallel else {})
    gradients = [p.grad for p in layer.parameters()]
    actual = [y.detach(), x_local.grad, *gradients]
    names, shards = ["y", "dx", "dw", "db"][: len(actual)], shards[: len(actual)]
    results = zip(names, actual, shards, by_torch(torch.float64), by_torch(dtype), strict=True)
    for name, mine, shard, want, torch_result in results:
        assert_close(name, mine, shard(want), shard(torch_result), ranks=ranks)
    assert all(parameter_shard(p).replicated for p in layer.parameters())
    return gradients


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_are_whole_when_backward_returns(ranks):
    cases = list(itertools.product([False, True], [True, False], [torch.float32, torch.bfloat16]))
    for case, results in zip(cases, run_cases_on_ranks(norm_case, ranks, cases), strict=True):
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True)), case


def wrong_size(rank, ranks):
    with pytest.raises(InputError, match="must end in hidden_size=17"):
        SequenceParallelLayerNorm(H, tp_group=dist.group.WORLD, sequence_parallel=True)(torch.zeros(4, 16))


def test_wrong_size():
    run_on_ranks(wrong_size, 2)


def test_one_rank_is_the_module_itself():
    layer, x = SequenceParallelLayerNorm(H, tp_group=None, sequence_parallel=True), torch.randn(3, H)
    torch.testing.assert_close(layer(x), F.layer_norm(x, (H,)))


def test_the_old_names_of_the_norms_warn():
    with pytest.warns(DeprecationWarning, match="SequenceParallelLayerNorm"):
        assert tensor_parallel.LayerNorm is SequenceParallelLayerNorm
    with pytest.warns(DeprecationWarning, match="SequenceParallelRMSNorm"):
        assert tensor_parallel.RMSNorm is tensor_parallel.SequenceParallelRMSNorm
