"""Start here when FSDP2 around tensor-parallel layers changes values, gradients or updates."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import fused_megatron as fm
from fused_megatron import ops, tensor_parallel
from fused_megatron.testing import run_on_ranks


class Block(nn.Module):
    def __init__(self, tp_group: Any, sequence_parallel: bool) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"tp_group": tp_group, "sequence_parallel": sequence_parallel, "dtype": torch.float64}
        self.norm = tensor_parallel.SequenceParallelLayerNorm(16, **kwargs)
        self.up = tensor_parallel.ColumnParallelLinear(16, 64, skip_bias_add=True, **kwargs)
        self.down = tensor_parallel.RowParallelLinear(64, 16, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(ops.bias_gelu(*self.up(self.norm(x))))


def model_of(mesh: Any, sequence_parallel: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(mesh.tp_group, sequence_parallel) for _ in range(2)))


def sharded(model: nn.Sequential, mesh: Any, **options: Any) -> nn.Sequential:
    for block in model:
        fully_shard(block, mesh=mesh.device_mesh["dp"], **options)
    return fully_shard(model, mesh=mesh.device_mesh["dp"], **options)


def check_steps(mesh: Any, sequence_parallel: bool) -> None:
    """Run three steps of Adam, and compare each gradient and parameter with a model that is not sharded over dp."""
    whole, split = model_of(mesh, sequence_parallel), sharded(model_of(mesh, sequence_parallel), mesh)
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in (whole, split)]
    generator = torch.Generator().manual_seed(7 + mesh.dp_rank)
    for _ in range(3):
        x, dy = torch.randn(2, 8, 3, 16, generator=generator, dtype=torch.float64)
        if sequence_parallel:
            x, dy = (t.chunk(mesh.tp_size)[mesh.tp_rank] for t in (x, dy))
        y, expected = split(x), whole(x)
        torch.testing.assert_close(y, expected)
        y.backward(dy)
        expected.backward(dy)
        for (name, mine), theirs in zip(split.named_parameters(), whole.parameters(), strict=True):
            assert isinstance(mine, DTensor) and mine.to_local().shape[0] * mesh.dp_size == theirs.shape[0], name
            dist.all_reduce(theirs.grad, group=mesh.dp_group)
            theirs.grad /= mesh.dp_size  # as FSDP averages
            torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, msg=lambda text, name=name: name + text)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for mine, theirs in zip(split.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(mine.full_tensor(), theirs.detach())
    state = split.state_dict()
    assert list(state) == list(whole.state_dict())
    split.load_state_dict(state)


def check_bfloat16(mesh: Any) -> None:
    """Run float32 parameters with bfloat16 products: check dtypes, and values to bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    whole = model_of(mesh, False).float()
    split = sharded(model_of(mesh, False).float(), mesh, mp_policy=policy)
    x = torch.randn(8, 3, 16, generator=torch.Generator().manual_seed(mesh.dp_rank))
    y = split(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), whole(x), rtol=2e-2, atol=5e-2)  # three roundings a block
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in split.parameters())


def on_ranks(rank: int, world_size: int) -> None:
    mesh = fm.init_mesh(tensor_parallel_size=2)
    check_steps(mesh, sequence_parallel=False)
    check_steps(mesh, sequence_parallel=True)
    check_bfloat16(mesh)


def test_fully_shard_around_tensor_parallel_layers() -> None:
    run_on_ranks(on_ranks, 4, timeout_s=240)
