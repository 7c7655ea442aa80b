"""Fused kernels, tensor-parallel layers and a trainer for transformers in PyTorch.

    import fused_megatron as fm
    mesh = fm.init_mesh(tensor_parallel_size=2)
    layer = fm.tensor_parallel.ColumnParallelLinear(1024, 4096, tp_group=mesh.tp_group)
    y = fm.ops.layer_norm(x, weight, bias)

Parts are imported when they are first used: so commands that touch no tensor start without torch. Training
(fused_megatron.training) is not among them: it brings the command line's dependencies.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fused_megatron import collectives, models, modules, ops, pipeline, tensor_parallel
    from fused_megatron.mesh import Mesh, init_mesh

__all__ = ["Mesh", "collectives", "init_mesh", "models", "modules", "ops", "pipeline", "tensor_parallel"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("Mesh", "init_mesh"):
        value: object = getattr(importlib.import_module("fused_megatron.mesh"), name)
    else:
        value = importlib.import_module(f"fused_megatron.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
