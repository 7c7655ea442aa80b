"""torch.compile of a model with fused layers: python examples/compile_model.py [backend]

On one process the model is one graph. Under torchrun the graph is cut only at collectives.
"""

import os
import sys

import torch

import fused_megatron as fm

if "RANK" in os.environ:
    torch.distributed.init_process_group()
mesh = fm.init_mesh(tensor_parallel_size=int(os.environ.get("WORLD_SIZE", "1")))


class Block(torch.nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = fm.modules.LayerNorm(hidden_size)
        layers = fm.tensor_parallel
        self.up = layers.ColumnParallelLinear(hidden_size, 4 * hidden_size, tp_group=mesh.tp_group, skip_bias_add=True)
        self.down = layers.RowParallelLinear(4 * hidden_size, hidden_size, tp_group=mesh.tp_group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(fm.ops.bias_gelu(*self.up(self.norm(x))))


torch.manual_seed(0)
model = torch.nn.Sequential(Block(64), Block(64))
compiled = torch.compile(model, fullgraph=mesh.tp_size == 1, backend=(*sys.argv, "inductor")[1])
x = torch.randn(32, 4, 64)
gradients = []
for variant in (model, compiled):
    model.zero_grad()
    variant(x).square().mean().backward()
    gradients.append([parameter.grad.clone() for parameter in model.parameters()])
torch.testing.assert_close(compiled(x), model(x))
torch.testing.assert_close(*gradients)
print(f"rank {mesh.rank}: compiled and eager agree, values and {len(gradients[0])} gradients")
if mesh.world_size > 1:
    torch.distributed.destroy_process_group()
