"""Fused kernels, tensor-parallel layers and a trainer for transformers in PyTorch.

    import fused_megatron as fm
    mesh = fm.init_mesh(tensor_parallel_size=2)
    layer = fm.tensor_parallel.ColumnParallelLinear(1024, 4096, tp_group=mesh.tp_group)
    y = fm.ops.layer_norm(x, weight, bias)
    model = fm.parallelize(model, mesh)  # a Hugging Face model, or your own

Each part is imported at its first use, so that commands that need no tensors start without torch. Training is not an
attribute of this module: `import fused_megatron.training` also imports the dependencies of the command line.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fused_megatron import collectives, context_parallel, interop, models, modules, ops, pipeline, tensor_parallel
    from fused_megatron.data_parallel.shard_data_parallel import shard_data_parallel
    from fused_megatron.data_parallel.sharded_optimizer import ShardedOptimizer
    from fused_megatron.interop.accelerator import Accelerator
    from fused_megatron.interop.add_adapters import add_adapters
    from fused_megatron.interop.full_state import full_state_dict, load_full_state_dict
    from fused_megatron.interop.lightning_strategy import LightningStrategy
    from fused_megatron.interop.parallelize import parallelize
    from fused_megatron.interop.pretrained import load_pretrained_shards
    from fused_megatron.interop.trainer_callback import TrainerCallback
    from fused_megatron.mesh import Mesh, init_mesh
    from fused_megatron.modules import replace_modules
    from fused_megatron.planning.verify.user_model import verify
    from fused_megatron.sharding import GradScaler, clip_grad_norm_

__all__ = [
    "Accelerator",
    "GradScaler",
    "LightningStrategy",
    "Mesh",
    "ShardedOptimizer",
    "TrainerCallback",
    "add_adapters",
    "clip_grad_norm_",
    "collectives",
    "context_parallel",
    "full_state_dict",
    "init_mesh",
    "interop",
    "load_full_state_dict",
    "load_pretrained_shards",
    "models",
    "modules",
    "ops",
    "parallelize",
    "pipeline",
    "replace_modules",
    "shard_data_parallel",
    "tensor_parallel",
    "verify",
]

_HOME = {
    "Accelerator": "interop.accelerator",
    "LightningStrategy": "interop.lightning_strategy",
    "TrainerCallback": "interop.trainer_callback",
    "Mesh": "mesh",
    "init_mesh": "mesh",
    "replace_modules": "modules",
    "parallelize": "interop",
    "add_adapters": "interop",
    "GradScaler": "sharding",
    "clip_grad_norm_": "sharding",
    "full_state_dict": "interop",
    "load_full_state_dict": "interop",
    "verify": "planning.verify.user_model",
    "load_pretrained_shards": "interop",
    "shard_data_parallel": "data_parallel.shard_data_parallel",
    "ShardedOptimizer": "data_parallel.sharded_optimizer",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = importlib.import_module(f"fused_megatron.{_HOME.get(name, name)}")
    if name in _HOME:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
