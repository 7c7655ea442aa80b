"""Layers of a stack that run on blocks of the sequence, and operands that neighbouring linears share."""

import inspect
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError, check_divisible
from fused_megatron.collectives import (
    Group,
    all_gather_reduce_scatter,
    all_gather_split,
    group_size,
    identity_all_reduce,
    split_all_gather,
)

# Activations of Hugging Face models and of torch.nn's own with batch_first are [B, S, H].
SEQUENCE_DIM = 1
# What layers with cross-attention call it.
_SECOND_SEQUENCES = ("encoder_hidden_states", "key_value_states", "cross_attention_states", "memory")


class SequenceRegion:
    """A stack of layers whose activations are cut along the sequence, [B, S / R, H], while gradients are recorded.

    Without gradients (generate, evaluation) there is nothing to save memory for, and sequences may have any length, as
    the single tokens of generate: there the layers run without sequence parallelism.

        first layer    x [B, S, H] -> this rank's [B, S / R, H]          backward: all-gather
        attention      [B, S / R, H] -> [B, S, H] before its linears      backward: reduce-scatter
        last layer     [B, S / R, H] -> [B, S, H]                         backward: this rank's block
    """

    def __init__(self, tp_group: Group) -> None:
        self.tp_group = tp_group
        self._running: bool | None = None

    @property
    def active(self) -> bool:
        """Whether the layers now run on blocks. Outside of the stack's own forward it is a recomputation in backward
        (gradient checkpointing) that asks, and what is computed again was computed with gradients."""
        return self._running is not False

    def install(self, owner: nn.Module, first: nn.Module, last: nn.Module) -> list[Any]:
        """Hooks on the module whose forward runs the stack, and on the stack's ends; handles to remove them."""
        return [
            owner.register_forward_pre_hook(self._enter),
            owner.register_forward_hook(self._leave, always_call=True),
            first.register_forward_pre_hook(self._split, with_kwargs=True),
            last.register_forward_hook(self._gather_result),
        ]

    def install_gather(self, module: nn.Module) -> Any:
        """A hook that hands the module the whole sequence."""
        return module.register_forward_pre_hook(self._gather, with_kwargs=True)

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running = torch.is_grad_enabled()

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self._running = None

    @torch.compiler.disable
    def _split(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.active:
            return None
        _refuse_second_sequence(module, args, kwargs)
        return _with_activations(args, kwargs, self._own_block)

    def _own_block(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[SEQUENCE_DIM]
        try:
            check_divisible("sequence length", length, "tensor_parallel_size", group_size(self.tp_group))
        except InputError as error:
            raise InputError(
                f"{error} (pad the batch, or run without gradients: torch.no_grad(); or sequence_parallel=False)"
            ) from None
        return split_all_gather(x, SEQUENCE_DIM, self.tp_group)

    @torch.compiler.disable
    def _gather(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.active:
            return None
        _refuse_second_sequence(module, args, kwargs)
        return _with_activations(args, kwargs, lambda x: all_gather_reduce_scatter(x, SEQUENCE_DIM, self.tp_group))

    @torch.compiler.disable
    def _gather_result(self, module: nn.Module, args: Any, result: Any) -> Any:
        if not self.active:
            return None
        x, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
        x = all_gather_split(x, SEQUENCE_DIM, self.tp_group)
        return x if rest is None else (x, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SequenceRegion":
        memo[id(self.tp_group)] = self.tp_group  # a process group cannot be copied; both use the same
        twin = memo[id(self)] = SequenceRegion(self.tp_group)
        return twin


def _refuse_second_sequence(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Cross-attention: what it attends to is whole on every rank, where linears of a region sum gradients of blocks."""
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    name = next((name for name in _SECOND_SEQUENCES if isinstance(given.get(name), torch.Tensor)), None)
    if name is not None:
        raise InputError(
            f"sequence_parallel=True: {type(module).__name__} attends to a second sequence, {name}, whose gradient "
            "would not be whole (parallelize with sequence_parallel=False)"
        )


def _with_activations(args: tuple[Any, ...], kwargs: dict[str, Any], change: Any) -> tuple[Any, Any]:
    """The arguments with the activations changed: the first of them, or hidden_states."""
    if args and isinstance(args[0], torch.Tensor):
        return (change(args[0]), *args[1:]), kwargs
    if isinstance(kwargs.get("hidden_states"), torch.Tensor):
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
    raise InputError(
        "sequence_parallel=True needs layers that take their activations first, or as hidden_states "
        "(sequence_parallel=False works for any)"
    )


class SharedInput:
    """One all-reduce of the input's gradient for several linears that are called with the same tensor.

    The first of them takes the tensor through identity_all_reduce, the others find what it made. Whoever is called
    with another tensor has an all-reduce of his own, so that nothing depends on how a model calls its layers.
    """

    def __init__(self, tp_group: Group, users: int) -> None:
        self.tp_group, self.users = tp_group, users
        self._source: torch.Tensor | None = None
        self._shared: torch.Tensor | None = None
        self._version: int | None = None
        self._left = 0

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """x, whose gradient will be summed over the ranks."""
        version = None if x.is_inference() else x._version  # a tensor changed in place is another one
        stale = self._source is not x or self._version != version
        if stale or self._shared is None or self._shared.requires_grad != _records(x):
            self._source, self._version, self._left = x, version, self.users
            self._shared = identity_all_reduce(x, self.tp_group)
        shared = self._shared
        self._left -= 1
        if self._left == 0:
            self.release()
        return shared

    @torch.compiler.disable
    def release(self, *_: Any) -> None:
        """Keep nothing alive longer than the model itself does; a hook for when the module around them is done."""
        self._source = self._shared = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedInput":
        memo[id(self.tp_group)] = self.tp_group
        twin = memo[id(self)] = SharedInput(self.tp_group, self.users)
        return twin


def _records(x: torch.Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()
