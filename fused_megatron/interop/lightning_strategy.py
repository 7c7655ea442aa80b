"""Lightning strategy for models whose layers are shared by ranks: data for each rank, clipping, checkpoints.

This module imports lightning, so fused_megatron imports it at the first use of fm.LightningStrategy.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.interop.class_change import become
from fused_megatron.interop.context_region import groups_of_axes
from fused_megatron.interop.full_state import full_state_dict
from fused_megatron.interop.optimizer_shards import full_optimizer_state_dict, load_full_optimizer_state_dict
from fused_megatron.mesh import Mesh
from fused_megatron.optional_packages import install_command
from fused_megatron.sharding import clip_grad_norm_
from fused_megatron.sharding.replica_shards import replica_shards, whole_models

try:
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
    from lightning.pytorch.trainer.states import TrainerFn
except ImportError as error:
    raise ImportError(f"fm.LightningStrategy needs lightning: {install_command('lightning')}") from error


class LightningStrategy(DDPStrategy):
    """Lightning's DDPStrategy for models after fm.parallelize or fm.shard_data_parallel.

        mesh = fm.init_mesh(tensor_parallel_size=2)  # 4 ranks: tp 2 x dp 2
        module = MyLightningModule(fm.parallelize(model, mesh))
        trainer = lightning.Trainer(strategy=fm.LightningStrategy(mesh), devices=4, gradient_clip_val=1.0)
        trainer.fit(module, loader)

    Start it with torchrun. Ranks that share layers get the same samples; data-parallel ranks divide them, and average
    gradients by DistributedDataParallel over these ranks only, or by shard_data_parallel. gradient_clip_val is the norm
    of the whole model. Checkpoints have full weights and full optimizer states, as one process writes them; one process
    and any number of ranks load them.

    Args:
        mesh: what init_mesh returned.
        options: of DDPStrategy.

    Raises:
        InputError: the mesh has several pipeline stages; when training starts, if the model was parallelized over
            another mesh, or if the precision needs a gradient scaler ("16-mixed").
    """

    def __init__(self, mesh: Mesh, **options: Any) -> None:
        if mesh["pp"].size > 1:
            raise InputError(
                f"pipeline_parallel_size={mesh['pp'].size}: Lightning runs whole models (pipeline stages are trained "
                "by fused-megatron train, or by PipelineExecutor)"
            )
        super().__init__(**options)
        self._mesh, self._trains = mesh, False

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The part of the samples that this rank gets."""
        return {"num_replicas": self._mesh.dp_size, "rank": self._mesh.dp_rank}

    def setup(self, trainer: Any) -> None:
        """Place the model and make optimizers. DDPStrategy would copy rank 0's shards to all ranks in evaluation."""
        self._check_model()
        self._trains = trainer.state.fn == TrainerFn.FITTING
        ParallelStrategy.setup(self, trainer)
        precision: Any = self.precision_plugin
        become(precision, WholeNormClipping)
        precision.clipped_model = self._module

    def _setup_model(self, model: nn.Module) -> Any:
        """Average gradients over data-parallel ranks only."""
        if not self._trains or self._mesh.dp_size == 1 or replica_shards(model) is not None:
            return model
        devices = self.determine_ddp_device_ids()
        return nn.parallel.DistributedDataParallel(
            model, devices, process_group=self._mesh.dp_group, **self._ddp_kwargs
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the full weights on rank 0, and an empty dict on the others. All ranks must call."""
        return full_state_dict(self._module, rank0_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load full weights; each rank keeps its shards."""
        with whole_models([self._module]):
            super().load_model_state_dict(checkpoint, strict)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the full state of an optimizer on rank 0, and an empty dict on the others. All ranks must call."""
        own = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return full_optimizer_state_dict(self._module, own, rank0_only=True)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load full states of the optimizers; each rank keeps its shards."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_full_optimizer_state_dict(self._module, optimizer, state)

    @property
    def _module(self) -> nn.Module:
        module: Any = self.lightning_module
        return module

    def _check_model(self) -> None:
        for axis, group in groups_of_axes(self._module).items():
            if group not in (self._mesh.tp_group, self._mesh["cp"].group):
                raise InputError(f"the model's {axis} ranks are not those of the mesh: give LightningStrategy the mesh")
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise InputError(
                'precision="16-mixed": the scaler of Lightning looks at one rank\'s gradients (precision="bf16-mixed")'
            )


class WholeNormClipping:
    """Methods of a Lightning precision plugin that clips by the norm of a model in shards.

    Attributes:
        clipped_model: the model.
    """

    clipped_model: nn.Module

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        """Clip by the norm of the whole model."""
        clip_grad_norm_(self.clipped_model, clip_val)
