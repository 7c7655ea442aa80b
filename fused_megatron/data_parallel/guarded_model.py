"""Errors for calls that would train or save a model wrongly after shard_data_parallel."""

import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fused_megatron.checks import InputError
from fused_megatron.data_parallel.sharded_replica import ShardedReplica

_OPTIMIZER = "fm.ShardedOptimizer(model, torch.optim.AdamW, lr=..) updates this rank's rows"
# (Module, function) that asks for the parameters -> (its name in the error, the way out).
_CALLERS = {
    ("torch.nn.parallel.distributed", "__init__"): (
        "DistributedDataParallel",
        "leave it out: shard_data_parallel averages the gradients",
    ),
    ("torch.distributed.fsdp._fully_shard._fully_shard", "fully_shard"): (
        "fully_shard",
        "leave it out: shard_data_parallel shards the model",
    ),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "__init__"): (
        "FullyShardedDataParallel",
        "leave it out: shard_data_parallel shards the model",
    ),
    ("torch.optim.optimizer", "__init__"): ("a torch optimizer of model.parameters()", _OPTIMIZER),
    ("torch.nn.utils.clip_grad", "clip_grad_norm_"): (
        "torch.nn.utils.clip_grad_norm_",
        "fm.clip_grad_norm_(model, max_norm) counts the rows of all ranks",
    ),
}
_DEPTH = 8  # callers of named_parameters() among which these functions are looked for


class GuardedParameters:
    """Replacement of a model's named_parameters, through which wrappers and optimizers reach the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters.

        Raises:
            InputError: the caller is a wrapper, an optimizer or a function that would be wrong with sharded rows.
        """
        frame: FrameType | None = sys._getframe(1)
        for _ in range(_DEPTH):
            if frame is None:
                break
            found = _CALLERS.get((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
            if found is not None:
                raise InputError(f"{found[0]} cannot work on a model after shard_data_parallel ({found[1]})")
            frame = frame.f_back
        yield from type(self._model).named_parameters(self._model, *args, **options)


def guard_model(model: nn.Module, replica: ShardedReplica) -> None:
    """Install the errors in a model, and make its zero_grad() begin a step of the replica."""

    def zero_grad(set_to_none: bool = True) -> None:
        replica.zero_()

    def apply(fn: Any, recurse: bool = True) -> nn.Module:
        _check_keeps(fn, replica)
        return type(model)._apply(model, lambda x: _kept(x, fn(x)), recurse)

    # Python finds plain attributes before the methods of the class.
    replaced = {"named_parameters": GuardedParameters(model), "zero_grad": zero_grad, "_apply": apply}
    model.__dict__.update(replaced, no_sync=replica.no_sync)
    model.register_state_dict_pre_hook(replica.before_state_dict)
    model.register_load_state_dict_pre_hook(replica.before_load)
    model.register_load_state_dict_post_hook(replica.after_load)
    _refuse_other_optimizers(replica)


def _check_keeps(fn: Any, replica: ShardedReplica) -> None:
    """Raise if fn, a function of model.to() and similar methods, would replace the values of a parameter."""
    for like in {(p.dtype, p.device): p for p in replica.parameters.values()}.values():
        changed = fn(like.detach().new_empty(1))
        if (changed.dtype, changed.device) != (like.dtype, like.device):
            raise InputError(
                f"the model cannot become {changed.dtype} on {changed.device} after shard_data_parallel (move and "
                "convert it before)"
            )


def _kept(x: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """Return x where a change is only a copy: a tensor on the CPU that is sent to cpu:0 would leave its bucket."""
    return x if (changed.dtype, changed.device) == (x.dtype, x.device) else changed


def _refuse_other_optimizers(replica: ShardedReplica) -> None:
    """Make an optimizer of the model's own parameters raise in its step, since their gradients are not complete."""
    held = weakref.ref(replica)

    def before_step(optimizer: Any, *_: Any) -> None:
        found = held()
        if found is None:
            return
        whole = set(found.parameters.values())
        if any(p in whole for group in optimizer.param_groups for p in group["params"]):
            raise InputError(
                f"{type(optimizer).__name__} has parameters of a model after shard_data_parallel ({_OPTIMIZER})"
            )

    handle = register_optimizer_step_pre_hook(before_step)
    weakref.finalize(replica, handle.remove)
