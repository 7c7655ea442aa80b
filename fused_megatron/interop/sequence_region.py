"""Sequence parallelism of a stack of layers by hooks, and one all-reduce for linears with a common input."""

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
# Argument names of the second sequence in layers with cross-attention.
_SECOND_SEQUENCES = ("encoder_hidden_states", "key_value_states", "cross_attention_states", "memory")


class SequenceRegion:
    """A stack of layers whose activations are blocks of the sequence, [B, S / R, H], while gradients are recorded.

    Without gradients (generate, evaluation) no activations are saved, and sequences may have any length, such as the
    single tokens of generate. The layers then run without sequence parallelism.

        first layer    x [B, S, H] -> this rank's [B, S / R, H]          backward: all-gather
        attention      [B, S / R, H] -> [B, S, H] before its linears      backward: reduce-scatter
        last layer     [B, S / R, H] -> [B, S, H]                         backward: this rank's block
    """

    def __init__(self, tp_group: Group) -> None:
        self.tp_group = tp_group
        self._running: bool | None = None

    @property
    def active(self) -> bool:
        """Whether the layers run on blocks of the sequence.

        Also true outside of the stack's forward: only gradient checkpointing runs layers there, and it recomputes what
        was computed with gradients.
        """
        return self._running is not False

    def install(self, owner: nn.Module, first: nn.Module, last: nn.Module) -> list[Any]:
        """Install hooks on the module whose forward runs the stack, and on the first and last layer; return handles."""
        return [
            owner.register_forward_pre_hook(self._enter),
            owner.register_forward_hook(self._leave, always_call=True),
            first.register_forward_pre_hook(self._split, with_kwargs=True),
            last.register_forward_hook(self._gather_result),
        ]

    def install_gather(self, module: nn.Module) -> Any:
        """Install a hook that gathers the sequence for a module; return its handle."""
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
    """Refuse cross-attention: its second sequence is replicated, but linears of a region sum gradients of blocks."""
    arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    arguments = {**arguments, **arguments.get("kwargs", {})}
    name = next((name for name in _SECOND_SEQUENCES if isinstance(arguments.get(name), torch.Tensor)), None)
    if name is not None:
        raise InputError(
            f"sequence_parallel=True: {type(module).__name__} attends to a second sequence, {name}, whose gradient "
            "would not be whole (parallelize with sequence_parallel=False)"
        )


def _with_activations(args: tuple[Any, ...], kwargs: dict[str, Any], change: Any) -> tuple[Any, Any]:
    """Return the arguments with the activations changed: the first positional argument, or hidden_states."""
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

    The first linear passes the tensor through identity_all_reduce; the others reuse the result. A linear that is
    called with another tensor gets an all-reduce of its own, so any order of calls is right.

    Communication: none in forward; one all-reduce of dx in backward.
    """

    def __init__(self, tp_group: Group, users: int) -> None:
        self.tp_group = tp_group
        self.users = users
        self._source: torch.Tensor | None = None
        self._shared: torch.Tensor | None = None
        self._version: int | None = None
        self._left = 0

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Return x as a tensor whose gradient will be summed over the ranks."""
        version = None if x.is_inference() else x._version  # a tensor that was changed in place is not the same input
        stale = self._source is not x or self._version != version
        if stale or self._shared is None or self._shared.requires_grad != _records(x):
            self._source = x
            self._version = version
            self._left = self.users
            self._shared = identity_all_reduce(x, self.tp_group)
        shared = self._shared
        self._left -= 1
        if self._left == 0:
            self.release()
        return shared

    @torch.compiler.disable
    def release(self, *_: Any) -> None:
        """Drop the tensors; also a forward hook of the module around the linears, so that nothing stays alive."""
        self._source = self._shared = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedInput":
        memo[id(self.tp_group)] = self.tp_group
        twin = memo[id(self)] = SharedInput(self.tp_group, self.users)
        return twin


def _records(x: torch.Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()
