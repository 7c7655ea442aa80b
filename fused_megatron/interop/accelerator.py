"""Accelerate's Accelerator for models whose layers are shared by ranks: clipping, saving, metrics, data for each rank.

This module imports accelerate, so fused_megatron imports it at the first use of fm.Accelerator or fm.TrainerCallback.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.interop.class_change import become
from fused_megatron.interop.context_region import groups_of_axes
from fused_megatron.interop.full_state import full_state_dict
from fused_megatron.interop.optimizer_shards import full_optimizer_state_dict, load_full_optimizer_state_dict
from fused_megatron.mesh import Mesh
from fused_megatron.optional_packages import install_command
from fused_megatron.sharding import GradScaler, clip_grad_norm_
from fused_megatron.sharding.replica_shards import replica_shards, whole_models

try:
    import accelerate
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.utils import gather, recursively_apply
except ImportError as error:
    raise ImportError(f"fm.Accelerator needs accelerate: {install_command('accelerate')}") from error


class Accelerator(accelerate.Accelerator):
    """accelerate.Accelerator for models after fm.parallelize or fm.shard_data_parallel.

        mesh = fm.init_mesh(tensor_parallel_size=2)  # 4 ranks: tp 2 x dp 2
        accelerator = fm.Accelerator(mesh, gradient_accumulation_steps=2)
        fm.parallelize(model, mesh)
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    The methods of Accelerate stay, and these are right for shards:

        prepare              wraps no model over ranks that share its layers. Several data-parallel ranks average
                             gradients by DistributedDataParallel over these ranks only, or by shard_data_parallel
        data loaders         ranks that share layers get the same samples; data-parallel ranks divide them
        clip_grad_norm_      clips by the norm of the whole model (fm.clip_grad_norm_)
        gather_for_metrics   has each sample once
        get_state_dict, save_model, save_state
                             have full weights and full optimizer states, as one process would write them
        load_state           loads them, also what one process or another number of ranks wrote
        schedulers           step once for each data-parallel rank and step, or once a step with split_batches

    It holds a ParallelismConfig of its own (`parallelism_config`) instead of Accelerate's, which exists for CUDA
    devices only; so it works on CPUs, too. `reduce(x, "sum")` and `gather` see all ranks, as Accelerate's do.

    Args:
        mesh: what init_mesh returned.
        options: of accelerate.Accelerator.

    Raises:
        InputError: the mesh has several pipeline stages.

    Communication: creates one process group for each axis of several ranks; all ranks must call.
    """

    # Instances become this class after their construction, too (share_layers): so there are defaults on the class.
    _shared_config: Any = None
    _shared_mesh: Any = None
    _drops_copies = False

    def __init__(self, mesh: Mesh, **options: Any) -> None:
        if mesh["pp"].size > 1:
            raise InputError(
                f"pipeline_parallel_size={mesh['pp'].size}: Accelerate runs whole models (pipeline stages are trained "
                "by fused-megatron train, or by PipelineExecutor)"
            )
        super().__init__(**options)
        _begin_sharing(self, mesh["tp"].size * mesh["cp"].size)

    @property
    def parallelism_config(self) -> Any:
        """Sizes for data loaders and token counts: tp_size is the number of ranks that have the same samples."""
        return self._shared_config

    @property
    def torch_device_mesh(self) -> Any:
        """The DeviceMesh of parallelism_config."""
        return self._shared_mesh

    def prepare(self, *args: Any, device_placement: Any = None) -> Any:
        """Prepare objects as Accelerate does; models are prepared first."""
        placements = [None] * len(args) if device_placement is None else list(device_placement)
        result = [
            self.prepare_model(each, placement) if isinstance(each, nn.Module) else each
            for each, placement in zip(args, placements, strict=True)
        ]
        others = [index for index, each in enumerate(args) if not isinstance(each, nn.Module)]
        if others:
            prepared = super().prepare(
                *(args[index] for index in others), device_placement=[placements[index] for index in others]
            )
            for index, each in zip(others, prepared if len(others) > 1 else (prepared,), strict=True):
                result[index] = each
        return tuple(result) if len(result) > 1 else result[0]

    def prepare_model(self, model: Any, device_placement: Any = None, evaluation_mode: bool = False) -> Any:
        """Prepare a model as Accelerate does, with DistributedDataParallel over data-parallel ranks only.

        Raises:
            InputError: ranks that share the model's layers are not the ranks that get the same samples.
        """
        if getattr(model, "_is_accelerate_prepared", False):
            return super().prepare_model(model, device_placement, evaluation_mode)
        config = self.parallelism_config
        check_sharing_ranks(model, config.tp_size)
        prepared = super().prepare_model(model, device_placement, evaluation_mode=True)
        trains = not evaluation_mode and any(p.requires_grad for p in prepared.parameters())
        if trains and config.dp_shard_size > 1 and replica_shards(model) is None:
            options = {} if self.ddp_handler is None else self.ddp_handler.to_kwargs()
            devices = None if self.device.type == "cpu" else [self.local_process_index]
            group = self.torch_device_mesh["dp_shard"].get_group()
            prepared = nn.parallel.DistributedDataParallel(prepared, devices, process_group=group, **options)
        return prepared

    def prepare_data_loader(self, data_loader: Any, *args: Any, **options: Any) -> Any:
        """Divide a data loader over data-parallel ranks.

        Raises:
            InputError: an iterable dataset that Accelerate would give whole to every data-parallel rank.
        """
        config = self.parallelism_config
        is_iterable = isinstance(data_loader.dataset, torch.utils.data.IterableDataset)
        if is_iterable and config.tp_size > 1 and config.dp_shard_size > 1 and self.dispatch_batches is not False:
            raise InputError(
                "an IterableDataset over data-parallel ranks needs dispatch_batches=False (DataLoaderConfiguration of "
                "Accelerate; accelerator_config={'dispatch_batches': False} of TrainingArguments)"
            )
        return super().prepare_data_loader(data_loader, *args, **options)

    def prepare_optimizer(self, optimizer: Any, *args: Any, **options: Any) -> Any:
        """Prepare an optimizer; the result has full states (ShardedAcceleratedOptimizer)."""
        prepared = super().prepare_optimizer(optimizer, *args, **options)
        become(prepared, ShardedAcceleratedOptimizer)
        prepared.models_of_states = lambda: [self.unwrap_model(model) for model in self._models]
        return prepared

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """Prepare a scheduler; it counts data-parallel ranks, where Accelerate's counts all ranks."""
        prepared = super().prepare_scheduler(scheduler)
        become(prepared, DataParallelScheduler)
        prepared.steps_at_once = self.parallelism_config.dp_shard_size
        return prepared

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """Clip by the norm of the whole model; see fm.clip_grad_norm_.

        Args:
            parameters: all parameters of a prepared model.
            max_norm: as torch's.
            norm_type: as torch's.

        Raises:
            InputError: some parameters of a sharded model without the others.
        """
        asked = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        model = _owner(asked, self._models)
        if model is None:
            return super().clip_grad_norm_(asked, max_norm, norm_type)
        self.unscale_gradients()
        return clip_grad_norm_(model, max_norm, norm_type)

    def gather(self, tensor: Any) -> Any:
        """Gather from all ranks, as Accelerate does."""
        return recursively_apply(self._gather_once, tensor) if self._drops_copies else super().gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Gather the results of samples, each sample once. Numbers (tensors without dims) come from every rank."""
        copies = self.parallelism_config.tp_size
        if copies > 1 and use_gather_object and self.process_index % copies:
            input_data = type(input_data)()  # another rank has the same objects
        self._drops_copies = copies > 1
        try:
            return super().gather_for_metrics(input_data, use_gather_object)
        finally:
            self._drops_copies = False

    def get_state_dict(self, model: Any, unwrap: bool = True) -> Any:
        """Return the full weights on the main process, and an empty dict on the others. All ranks must call."""
        return full_state_dict(self.unwrap_model(model), rank0_only=True)

    def load_state(self, *args: Any, **options: Any) -> Any:
        """Load what save_state wrote on any number of ranks; random states only for the same number."""
        with whole_models(map(self.unwrap_model, self._models)):
            return super().load_state(*args, **options)

    def _gather_once(self, own: torch.Tensor) -> torch.Tensor:
        """Gather rows [n, ..] of all ranks; of ranks with the same samples keep the rows of one rank."""
        gathered: torch.Tensor = gather(own)
        if own.dim() == 0:
            return gathered
        by_rank = gathered.unflatten(0, (-1, self.parallelism_config.tp_size, own.shape[0]))
        return by_rank[:, 0].flatten(0, 1)


class ShardedAcceleratedOptimizer(AcceleratedOptimizer):
    """AcceleratedOptimizer whose state_dict has the full state, as on one process.

    Attributes:
        models_of_states: returns the models that have the optimizer's parameters.
    """

    models_of_states: Callable[[], list[nn.Module]]
    _gathered: Any = None

    def state_dict(self) -> Any:
        """Gather the full state. All ranks must call, except inside `gathered`."""
        return self._full_state() if self._gathered is None else self._gathered

    def load_state_dict(self, state_dict: Any) -> None:
        """Load a full state; each rank keeps its shards."""
        load_full_optimizer_state_dict(self._model(), self.optimizer, state_dict)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather the full state on entry; inside, state_dict returns it without communication. All ranks must enter."""
        self._gathered = self._full_state()
        try:
            yield
        finally:
            self._gathered = None

    def _full_state(self) -> dict[str, Any]:
        return full_optimizer_state_dict(self._model(), self.optimizer, rank0_only=True)

    def _model(self) -> nn.Module:
        """Return a module with all models that might have the parameters."""
        models = self.models_of_states()
        return models[0] if len(models) == 1 else nn.ModuleList(models)


class DataParallelScheduler(AcceleratedScheduler):
    """AcceleratedScheduler that steps once for each data-parallel rank, since they divide the batches of an epoch.

    Attributes:
        steps_at_once: the number of data-parallel ranks.
    """

    steps_at_once = 1
    split_batches: bool

    def step(self, *args: Any, **options: Any) -> None:
        """Step as AcceleratedScheduler does."""
        divides = self.step_with_optimizer and self.gradient_state.sync_gradients and not self.split_batches
        asked = self.split_batches
        self.split_batches = True  # one step a call
        try:
            for _ in range(self.steps_at_once if divides else 1):
                if divides and self.scheduler._step_count > getattr(self.scheduler, "total_steps", math.inf):
                    break  # OneCycleLR raises after its last step
                super().step(*args, **options)
        finally:
            self.split_batches = asked


def share_layers(accelerator: Any, model: nn.Module) -> None:
    """Make an Accelerator, made already, into this module's, for the ranks that share a model's layers.

    Raises:
        InputError: these ranks are not neighbours, or another layout was given as parallelism_config.
    """
    copies = 1
    for group in groups_of_axes(model).values():
        copies *= dist.get_world_size(group)
    given = accelerator.parallelism_config
    if given is not None and (given.tp_size * given.cp_size, given.data_parallel_size) != (
        copies,
        accelerator.num_processes // copies,
    ):
        raise InputError(
            f"parallelism_config: tp_size={given.tp_size} and {given.data_parallel_size} data-parallel ranks, and the "
            f"layers of the model are shared by {copies} of {accelerator.num_processes} ranks (leave "
            "parallelism_config out: it follows from the model)"
        )
    become(accelerator, Accelerator)
    _begin_sharing(accelerator, copies)
    check_sharing_ranks(model, copies)


def check_sharing_ranks(model: nn.Module, copies: int) -> None:
    """Raise InputError unless the ranks that share a model's layers are the `copies` neighbours of this rank."""
    groups = groups_of_axes(model)
    first = dist.get_rank() // copies * copies if dist.is_initialized() else 0
    size = 1
    for axis, group in groups.items():
        ranks = dist.get_process_group_ranks(group)
        size *= len(ranks)
        if not set(ranks) <= set(range(first, first + copies)):
            raise InputError(
                f"{axis} ranks {ranks} must be neighbours among ranks {first} to {first + copies - 1}, which get the "
                "same samples (fm.init_mesh makes such a mesh; parallelize the model over it)"
            )
    if size != copies:
        raise InputError(
            f"{size} ranks share the layers of the model, and {copies} ranks get the same samples: give fm.Accelerator "
            "the mesh of fm.parallelize"
        )


def _begin_sharing(accelerator: Any, copies: int) -> None:
    """Set the layout: `copies` neighbours have the same samples, and the others divide them."""
    ranks = accelerator.num_processes
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if ranks != world_size:
        raise InputError(
            f"Accelerate counts {ranks} ranks, and torch.distributed has {world_size} (start the ranks with torchrun; "
            "on CPUs use_cpu=True of TrainingArguments, or cpu=True of fm.Accelerator)"
        )
    assert ranks % copies == 0
    config = accelerate.ParallelismConfig(tp_size=copies, dp_shard_size=ranks // copies)
    accelerator._shared_config = config
    # Without an axis of several ranks there is no mesh to divide samples over.
    accelerator._shared_mesh = config.build_device_mesh(accelerator.device.type) if ranks > 1 else None
    if accelerator.scaler is not None and ranks > 1:
        # Ranks look for infinities in other gradients, and have to skip a step together.
        options = {} if accelerator.scaler_handler is None else accelerator.scaler_handler.to_kwargs()
        accelerator.scaler = GradScaler(dist.group.WORLD, accelerator.device.type, **options)


def _owner(parameters: list[torch.Tensor], models: Iterable[nn.Module]) -> nn.Module | None:
    """Return the model that has the parameters; None if none of the models has any of them."""
    asked = {id(parameter) for parameter in parameters}
    for model in models:
        own = {id(parameter) for parameter in model.parameters()}
        if asked & own:
            trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
            if not trained <= asked <= own:
                raise InputError(
                    f"clip_grad_norm_ of {len(asked)} of the model's {len(own)} parameters: the norm of a model in "
                    "shards is that of all its parameters (pass model.parameters())"
                )
            return model
    return None
