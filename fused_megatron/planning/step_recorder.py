"""Recorder of a rank's ops in a step: memory, products, transfers, host reads; for real and for fake tensors."""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_megatron.models import TransformerStack
from fused_megatron.observe.kernel_counts import kernels_of, product_flops
from fused_megatron.observe.record_communication import transfer_of
from fused_megatron.observe.storages import RESIZE_STORAGE, StorageLog
from fused_megatron.pipeline.schedule.action import Action

_DEVICE = torch.ops.prim.device.default
_READ = torch.ops.aten._local_scalar_dense.default
# The ops that tolist() runs besides the reads.
_TAKEN_APART = {torch.ops.aten.unbind.int, torch.ops.aten.select.int, torch.ops.aten.detach.default}
_FOUND = torch.ops.aten.nonzero.default
_COPIES = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}
"""Ops that copy between devices, with the position of the source among their arguments."""
_GATHER_OF_TIED_WEIGHT = "c10d._allgather_base_.pipeline"
_PIN = torch.ops.aten._pin_memory.default
# Products with an output of another dtype: torch has no implementation for the meta device.
_INTO_FLOAT32 = {torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out}
# Functions that read a number only from host memory: on a GPU they take another branch.
_READ_HOST_MEMORY = {
    ("tensor_parallel/embedding.py", "_check_ids"),
    ("tensor_parallel/embedding.py", "backward"),
    ("ops/linear_cross_entropy.py", "_scaled"),
    ("ops/linear_cross_entropy.py", "_add_scaled_"),
    ("reference/vocab_embedding.py", "vocab_embedding_backward_"),
}
# Functions that send the shapes of a message to another stage before the first message.
_RUN_IN_THE_FIRST_STEP = {("pipeline/run/messages.py", "_record_specs"), ("pipeline/run/messages.py", "_complete")}

LOSS_LAYER, OWN_LAYER = "loss", "embedding"
"""Layer of the loss's tensors, and of a stage's tensors outside of its layers: positions, masks, rotary tables."""
_ROOMS_OF_LAYERS = ("context_parallel", "expert_parallel", "models")
# Packages whose transfers the recorder tells apart.
_ROOMS = (*_ROOMS_OF_LAYERS, "data_parallel")
RECEIVED, HEADER, GATHERED_ROWS, REDUCED_ROWS = "received", "header", "gathered", "reduced"
"""Labels in place of a layer: a message from another stage, the header with its shapes, and weights and gradients that
ranks with the same weights send each other."""


class Place(NamedTuple):
    """Point of a run at which an op happens.

    Attributes:
        phase: the name that StepRecorder.phase was called with.
        action: the action of the schedule; None outside of all actions.
        layer: the layer of the model in a forward, or in its recomputation; "" outside of all layers.
    """

    phase: str
    action: Action | None
    layer: str


class Work(NamedTuple):
    """Key of a counter.

    Attributes:
        what: "flops" or "host_syncs"; "calls" or "bytes" of a transfer; "launches" or "moved" bytes of kernels.
        kind: kind of the transfer, as in record_communication, or of the kernels, as in kernel_counts; otherwise "".
        group: global ranks of the transfer; otherwise ().
        of_replicas: whether the transfer brings weights or gradients to ranks with the same weights.
        of_experts: whether it brings tokens to experts, or their results back.
    """

    what: str
    kind: str = ""
    group: tuple[int, ...] = ()
    of_replicas: bool = False
    of_experts: bool = False


class StepRecorder(TorchDispatchMode):
    """Dispatch mode that records all ops of a rank.

    Fake tensors have no values. When the host reads one, the recorder returns the values of set_values(), or else 0.5,
    0 or False: so a norm is finite and no flag is set. It counts every element of a mask as True.

    Messages with shapes (int64) are not counted: stages send them once, in the first step.

    Args:
        fake: whether the tensors are fake.
        on_meta: whether tensors of the meta device stand for a GPU's. Only then kernels are counted.

    Attributes:
        storages: log of all storages.
        work: counts by (phase, action).
        replicas: groups of global ranks with the same weights, which send each other weights and gradients.
    """

    def __init__(self, fake: bool, on_meta: bool = False) -> None:
        super().__init__()
        self._on_meta = on_meta
        self.storages: StorageLog[Place] = StorageLog(self.place)
        self.work: defaultdict[tuple[str, Action | None], Counter[Work]] = defaultdict(Counter)
        self.replicas: set[tuple[int, ...]] = set()
        self._fake = fake
        self._phase = ""
        self._at: Callable[[], Action | None] = lambda: None
        self._layers: list[str] = []
        self._loss_at: Action | None = None
        self._values: dict[int, tuple[torch.Tensor, Sequence[int]]] = {}
        self._last_read = 0

    @contextmanager
    def phase(self, name: str, at: Callable[[], Action | None] = lambda: None) -> Iterator[None]:
        """Record what runs inside as phase `name`; `at` returns the action that is running."""
        before = self._phase, self._at
        self._phase, self._at = name, at
        try:
            yield
        finally:
            self._phase, self._at = before

    def place(self) -> Place:
        """Return phase, action and layer that are running now."""
        action = self._at()
        if self._layers:
            return Place(self._phase, action, self._layers[-1])
        return Place(self._phase, action, LOSS_LAYER if action is not None and action == self._loss_at else "")

    def watch(self, stage: TransformerStack) -> None:
        """Register hooks that record the running layer of a stage: a block, or a module outside of the blocks."""
        self._name(stage, OWN_LAYER)
        for name, child in stage.named_children():
            for block, layer in child.named_children() if name == "blocks" else [("", child)]:
                self._name(layer, f"blocks.{block}" if block else name)
        if stage.span.last:
            stage.register_forward_hook(lambda *_: self._expect_loss())

    def set_values(self, tensor: torch.Tensor, values: Sequence[int]) -> None:
        """Set the values that the host reads from a fake tensor."""
        self._values[tensor.untyped_storage()._cdata] = tensor, values

    def relabel(self, tensor: torch.Tensor, layer: str) -> None:
        """Set the layer of a tensor that was made outside of all layers."""
        storage = self.storages.of(tensor)
        if storage is not None:
            storage.made = storage.made._replace(layer=layer)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:
            return func(*args) if not self._fake or self._on_meta else args[0].fake_device
        if func is _READ:
            return self._read(args[0])
        if func.namespace == "c10d":
            self._transfer(func.overloadpacket.__name__, args)
            if self._fake and str(func) == _GATHER_OF_TIED_WEIGHT:
                # gloo and NCCL gather a list of tensors to one buffer first.
                self.storages.see(func, (), args[0].contiguous())
        if self._fake and func is _FOUND:  # the number of nonzero elements depends on values: take the most, all
            result = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        elif self._fake and func is _PIN:  # torch has no fake implementation of it
            result = args[0]
        elif self._on_meta and func in _INTO_FLOAT32:
            result = kwargs["out"]
        elif self._on_meta and func in _COPIES and _is_copy_to_host(args, kwargs):
            return self._copy_to_host(args, kwargs)
        else:
            result = func(*args, **kwargs)
        if self._on_meta:
            self._count_kernels(func, args, kwargs, result)
        if func not in _TAKEN_APART:
            self._last_read = 0
        if func is _FOUND:
            self._count_sync(args[0])
        elif func in _COPIES and _waits_for_copy(args[_COPIES[func]], result, kwargs):
            self._count_sync(result if result.device.type != "cpu" else args[_COPIES[func]])
        flops = product_flops(func, args, kwargs, result)
        if flops is not None:
            self._count(Work("flops"), flops)
        self.storages.see(func, (args, kwargs), result)
        if func is RESIZE_STORAGE:
            self.relabel(args[0], GATHERED_ROWS)
        return result

    def _count_kernels(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        kernels = kernels_of(func, args, kwargs, result)
        if kernels is not None:
            self._count(Work("launches", kernels.kind), kernels.launches)
            self._count(Work("moved", kernels.kind), kernels.num_bytes)

    def _count(self, work: Work, number: int) -> None:
        self.work[self._phase, self._at()][work] += number

    def _count_sync(self, tensor: torch.Tensor) -> None:
        """Count one wait of the host for a tensor's device. On a CPU, count the waits that a GPU would cause."""
        caller = _function_of_the_package()
        if caller not in _RUN_IN_THE_FIRST_STEP and (tensor.device.type != "cpu" or caller not in _READ_HOST_MEMORY):
            self._count(Work("host_syncs"), 1)

    def _transfer(self, name: str, args: Any) -> None:
        found = transfer_of(name, args)
        if found.kind in ("send", "receive") and found.dtype == torch.int64:
            return
        room = _room_of_the_caller()
        of_replicas = found.group in self.replicas and room not in _ROOMS_OF_LAYERS
        of_experts = room == "expert_parallel"
        if of_replicas:
            for tensor in tree_leaves(args[:2]):
                if isinstance(tensor, torch.Tensor):
                    self.relabel(tensor, GATHERED_ROWS if found.kind == "all_gather" else REDUCED_ROWS)
        self._count(Work("calls", found.kind, found.group, of_replicas, of_experts), 1)
        self._count(Work("bytes", found.kind, found.group, of_replicas, of_experts), found.num_bytes)

    def _read(self, tensor: torch.Tensor) -> Any:
        if self._on_meta and not tensor.is_meta:
            return _READ(tensor)
        key = tensor.untyped_storage()._cdata
        told = self._values.get(key)
        if self._last_read != key and told is None:  # reading all elements of a tensor in turn counts once
            self._count_sync(tensor)
        self._last_read = key
        if not self._fake:
            return _READ(tensor)
        if told is not None:
            index = int(tensor.storage_offset())
            if index == len(told[1]) - 1:
                del self._values[key]
            return told[1][index]
        if tensor.dtype == torch.bool:
            return False
        return 0.5 if tensor.is_floating_point() else 0

    def _copy_to_host(self, args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Return a tensor of the meta device as a tensor of the host, with the values that _read would return."""
        *destination, source = args[:2] if len(args) > 1 else args
        told = self._values.pop(source.untyped_storage()._cdata, None)
        if told is None:
            self._count_sync(source)
        value = 0.5 if source.is_floating_point() else 0
        copied = torch.full(source.shape, value, dtype=kwargs.get("dtype") or source.dtype)
        if told is not None:
            copied.copy_(torch.tensor(told[1]).view(source.shape))
        return destination[0].copy_(copied) if destination else copied

    def _name(self, module: nn.Module, layer: str) -> None:
        def enter(*_: Any) -> None:
            self._layers.append(layer)

        def leave(*_: Any) -> None:
            if self._layers:
                self._layers.pop()

        module.register_forward_pre_hook(enter)
        # always_call: a recomputation leaves the layer by an exception when it has all tensors that it needs.
        module.register_forward_hook(leave, always_call=True)

    def _expect_loss(self) -> None:
        self._loss_at = self._at()


def _function_of_the_package() -> tuple[str, str]:
    """Return file and name of the innermost running function of the package outside of what records it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        _, package, path = frame.f_code.co_filename.rpartition("fused_megatron/")
        if package and not path.startswith(("planning/", "observe/")):
            return path, frame.f_code.co_name
        frame = frame.f_back
    return "", ""


def _room_of_the_caller() -> str:
    """Return the innermost of _ROOMS that runs: a group may serve a layer and also sum gradients; "" for none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        folders = frame.f_code.co_filename.split("/")[-3:-1]
        if folders[:1] == ["fused_megatron"] and folders[-1] in _ROOMS:
            return folders[-1]
        frame = frame.f_back
    return ""


def _is_copy_to_host(args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether the arguments of _to_copy or copy_ are a tensor of the meta device and a place on the host."""
    if len(args) > 1:
        return bool(args[1].is_meta and not args[0].is_meta)
    device = kwargs.get("device")
    return bool(args[0].is_meta and device is not None and torch.device(device).type == "cpu")


def _waits_for_copy(source: torch.Tensor, result: torch.Tensor, keywords: Mapping[str, Any]) -> bool:
    """Return whether the host waits until a copy between two devices is done."""
    return source.device.type != result.device.type and not keywords.get("non_blocking", False)
