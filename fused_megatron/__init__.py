"""Fused kernels, tensor-parallel layers and a trainer for transformers in PyTorch.

    import fused_megatron as fm
    mesh = fm.init_mesh(tensor_parallel_size=2)
    layer = fm.tensor_parallel.ColumnParallelLinear(1024, 4096, tp_group=mesh.tp_group)
    y = fm.ops.layer_norm(x, weight, bias)

Training (fused_megatron.training) is not imported here: it brings the command line's dependencies.
"""

from fused_megatron import collectives, models, modules, ops, tensor_parallel
from fused_megatron.mesh import Mesh, init_mesh

__all__ = ["Mesh", "collectives", "init_mesh", "models", "modules", "ops", "tensor_parallel"]
