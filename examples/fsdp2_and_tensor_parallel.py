"""FSDP2 around tensor-parallel layers: torchrun --nproc-per-node 4 examples/fsdp2_and_tensor_parallel.py

The model has two data-parallel replicas, and in each two ranks share every layer. So each rank keeps a quarter of every
sharded weight.
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import fused_megatron as fm


class Block(torch.nn.Module):
    def __init__(self, hidden_size: int, tp_group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.norm = fm.modules.LayerNorm(hidden_size)
        layers = fm.tensor_parallel
        self.up = layers.ColumnParallelLinear(hidden_size, 4 * hidden_size, tp_group=tp_group, skip_bias_add=True)
        self.down = layers.RowParallelLinear(4 * hidden_size, hidden_size, tp_group=tp_group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(fm.ops.bias_gelu(*self.up(self.norm(x))))


dist.init_process_group()
mesh = fm.init_mesh(tensor_parallel_size=2)
torch.manual_seed(0)  # the same on every rank: each rank draws the full weights and keeps its shard
model = torch.nn.Sequential(Block(64, mesh.tp_group), Block(64, mesh.tp_group))
for block in model:
    fully_shard(block, mesh=mesh.device_mesh["dp"])
fully_shard(model, mesh=mesh.device_mesh["dp"])

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
batches = torch.randn(5, mesh.dp_size, 16, 4, 64)  # ranks that share the layers share the samples too
for batch in batches[:, mesh.dp_rank]:
    loss = (model(batch) - batch.roll(1, 0)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(loss.detach_(), dist.ReduceOp.SUM)  # the mean over all ranks
    if mesh.rank == 0:
        print(f"loss {loss.item() / mesh.world_size:.6f}")
dist.destroy_process_group()
