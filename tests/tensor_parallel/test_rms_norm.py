"""Start here when an RMS norm under sequence parallelism has partial gradients."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.mesh import init_mesh
from fused_megatron.tensor_parallel import SequenceParallelRMSNorm
from fused_megatron.testing.run_on_ranks import run_on_ranks

S, B, H = 6, 3, 20


def data() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((S, B, H), (S, B, H), (H,)))


def normalised(rank: int, world_size: int, sequence_parallel: bool) -> tuple[torch.Tensor, ...]:
    x, dy, weight = data()
    layer = SequenceParallelRMSNorm(H, tp_group=init_mesh(world_size).tp_group, sequence_parallel=sequence_parallel)
    with torch.no_grad():
        layer.weight.copy_(weight)
    if sequence_parallel:
        x, dy = (t.chunk(world_size)[rank] for t in (x, dy))
        with pytest.raises(InputError, match=f"must end in hidden_size={H}"):
            layer(x[..., 1:])
    y = layer(x)
    y.backward(dy)
    assert layer.weight.grad is not None
    return y.detach(), layer.weight.grad


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_output_and_whole_gradient(sequence_parallel: bool) -> None:
    x, dy, weight = (t.double() for t in data())
    weight.requires_grad_()
    expected = F.rms_norm(x, (H,), weight, 1e-5)
    expected.backward(dy)
    ranks = run_on_ranks(normalised, 2, sequence_parallel)
    y = torch.cat([y for y, _ in ranks]) if sequence_parallel else ranks[0][0]
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    for _, gradient in ranks:
        assert torch.equal(gradient, ranks[0][1])
        torch.testing.assert_close(gradient.double(), weight.grad, rtol=1e-5, atol=1e-5)
