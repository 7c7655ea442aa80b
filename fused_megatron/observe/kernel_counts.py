"""Counts of a step's GPU kernels without a GPU: launches and bytes by kind, of ops on tensors of the meta device."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

PRODUCT, ATTENTION, NORM, ACTIVATION, RESIDUAL, EMBEDDING, LOSS, EXPERTS, OPTIMIZER, COPY, OTHER = (
    "products",
    "attention",
    "norms",
    "MLP activation",
    "dropout and residual",
    "embedding",
    "loss",
    "experts",
    "optimizer",
    "copies",
    "other",
)
KINDS = (PRODUCT, ATTENTION, NORM, ACTIVATION, RESIDUAL, EMBEDDING, LOSS, EXPERTS, OPTIMIZER, COPY, OTHER)
"""Kinds of kernels, in the order of a report."""

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_FLASH],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[_FLASH_BACKWARD],
}

_KINDS_BY_NAME = {
    **dict.fromkeys(["mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm"], PRODUCT),
    **dict.fromkeys(["native_layer_norm", "native_layer_norm_backward", "_fused_rms_norm"], NORM),
    **dict.fromkeys(["copy_", "_foreach_copy_", "_to_copy", "clone", "cat", "stack"], COPY),
    **dict.fromkeys(["adamw_", "sum_of_squares"], OPTIMIZER),
    **dict.fromkeys(["gelu", "gelu_backward", "silu", "silu_backward"], ACTIVATION),
    **dict.fromkeys(["_softmax", "_softmax_backward_data"], ATTENTION),
}
# Parts of names of ops that have several names.
_KINDS_BY_PART = {
    "attention": ATTENTION,
    "rotary": ATTENTION,
    "query_key_norm": ATTENTION,
    "masked_softmax": ATTENTION,
    "_norm_": NORM,
    "bias_dropout_add": RESIDUAL,
    "embedding": EMBEDDING,
    "cross_entropy": LOSS,
    "expert_": EXPERTS,
    "weighted_swiglu": EXPERTS,
    "bias_gelu": ACTIVATION,
    "bias_swiglu": ACTIVATION,
    "bias_geglu": ACTIVATION,
}
# Ops that launch nothing: views whose schema does not say so, memory that nobody has written, questions to the host.
_NO_KERNEL = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_", "resize_storage_bytes_"),
    *("_unsafe_view", "set_", "_local_scalar_dense", "is_pinned", "record_stream", "device"),
}
# Arguments that these ops only write: Tensor(a!) says "written", and for most ops means "read and written".
_ONLY_WRITTEN = {
    **dict.fromkeys(["copy_", "zero_", "fill_", "normal_", "uniform_", "_foreach_copy_", "_foreach_zero_"], ("self",)),
    "adamw_": ("low",),
    "rotary_embedding_out": ("q_out", "k_out"),
    "query_key_norm_out": ("q_out", "k_out"),
    "query_key_norm_backward_out": ("dq_out", "dk_out", "dv_out"),
}
# Ops that read of a table the rows which they return.
_READS_ROWS = {"embedding", "index_select", "gather", "index", "vocab_embedding_forward"}
# Ops that add rows to some rows of a table: the arguments of the rows and of the table.
_ADDS_ROWS = {"index_add_": ("source", "self"), "vocab_embedding_backward_": ("dy", "total")}

ADAMW_TENSORS, SQUARES_TENSORS = 64, 192
"""Tensors that one launch of adamw_ (kAdamwTensors) and of sum_of_squares (kSquaresTensors) takes."""


class Kernels(NamedTuple):
    """Kernels of one op: their kind, the number of launches, and the bytes that they read and write."""

    kind: str
    launches: int
    num_bytes: int


def kernels_of(
    func: Any, args: Any, kwargs: Mapping[str, Any], results: Any, device_type: str = "meta"
) -> Kernels | None:
    """Return the kernels that a GPU would run for an op on tensors of this device; None if it runs none.

    Fused ops launch what their CUDA or Triton code launches (csrc/, kernels/). Attention is torch's FlashAttention.
    Every other op counts as one launch, as most ops of torch have one kernel: sorts and sums over long rows have more.
    Bytes: each op reads its operands once and writes its results once; temporary memory inside an op is left out.
    """
    name = func._schema.name.partition("::")[2]
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    if func.namespace == "c10d" or views or name in _NO_KERNEL:
        return None
    read, written = _touched(func, name, args, kwargs, results)
    if not any(tensor.device.type == device_type and tensor.numel() for tensor in (*read, *written)):
        return None  # work of the host, or none
    if name in _READS_ROWS:
        num_bytes = 2 * sum(map(_bytes, written))
    elif name in _ADDS_ROWS:
        rows, table = (_named(func, args, kwargs)[argument] for argument in _ADDS_ROWS[name])
        num_bytes = _bytes(rows) + 2 * rows.numel() * table.element_size()
    else:
        num_bytes = sum(map(_bytes, (*read, *written)))
    launches = _LAUNCHES.get(name)
    return Kernels(kind_of(name), 1 if launches is None else launches(_named(func, args, kwargs)), num_bytes)


def product_flops(func: Any, args: Any, kwargs: Mapping[str, Any], results: Any) -> int | None:
    """Return the floating-point operations of an op of matrix products, as torch counts them; None for another op."""
    formula = _FLOPS.get(func.overloadpacket)
    if formula is None:
        return None
    operands = [arg for arg in args if not isinstance(arg, torch.dtype)]  # torch's formulas take no out_dtype
    return formula(*operands, **kwargs, out_val=results)


def kind_of(name: str) -> str:
    """Return the kind of an op's kernels by its name, without namespace and overload."""
    known = _KINDS_BY_NAME.get(name)
    return known or next((kind for part, kind in _KINDS_BY_PART.items() if part in name), OTHER)


class AttentionOfAGPU(TorchFunctionMode):
    """Context manager in which attention on the meta device runs the ops of FlashAttention, as on a GPU.

    Otherwise scaled_dot_product_attention on the meta device runs products and a softmax. It takes only what
    FlashAttention takes: no mask, 16 bits, heads of at most 256.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not args[0].is_meta or not _takes_flash(*args, **kwargs):
            return func(*args, **kwargs)
        query, key, value = args[:3]
        dropout, causal = kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False)
        return _FLASH(query, key, value, dropout, causal, False, scale=kwargs.get("scale"))[0]


def _takes_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any, attn_mask: Any = None, **_: Any
) -> bool:
    # Our calls name the other arguments.
    plain = not others and attn_mask is None and query.dtype in (torch.bfloat16, torch.float16)
    return plain and query.shape[-1] == value.shape[-1] <= 256


def _named(func: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments by name, with the defaults of the schema."""
    named = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    return {**named, **dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}


def _touched(
    func: Any, name: str, args: Any, kwargs: Mapping[str, Any], results: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the tensors that an op reads and the tensors that it writes."""
    values = _named(func, args, kwargs)
    read: list[torch.Tensor] = []
    written: list[torch.Tensor] = []
    for argument in func._schema.arguments:
        tensors = list(_tensors(values.get(argument.name)))
        if argument.is_write:
            is_kept = name == "adamw_" and argument.name == "gradient" and not values["zero_gradient"]
            written += [] if is_kept else tensors
            if not argument.is_out and argument.name not in _ONLY_WRITTEN.get(name, ()):
                read += tensors
        else:
            read += tensors
    known = {id(tensor) for tensor in written}
    return read, written + [tensor for tensor in _tensors(results) if id(tensor) not in known]


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor; of an expanded tensor, the bytes of its memory."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _with_column_sums(*flags: str) -> Callable[[Mapping[str, Any]], int]:
    """Return the launches of a backward that adds up partial sums of a parameter's gradient in a second kernel."""
    parameters = {"need_dweight": "weight", "need_dbias": "bias"}
    return lambda named: 1 + any(named[flag] and named[parameters[flag]] is not None for flag in flags)


def _flash_backward(named: Mapping[str, Any]) -> int:
    """Return 3: sums of dy y, the three gradients, the query's gradient to 16 bits. Shared heads: a sum for k and v."""
    return 3 + 2 * (named["query"].shape[1] != named["key"].shape[1])


# Launches of ops that do not have one kernel.
_LAUNCHES: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "layer_norm_backward": _with_column_sums("need_dweight", "need_dbias"),
    "rms_norm_backward": _with_column_sums("need_dweight"),
    "bias_gelu_backward": _with_column_sums("need_dbias"),
    "bias_geglu_backward": _with_column_sums("need_dbias"),
    "bias_swiglu_backward": _with_column_sums("need_dbias"),
    "bias_dropout_add_backward": _with_column_sums("need_dbias"),
    "query_key_norm_backward_out": lambda named: 2,  # and the sums of the weights' gradients
    "vocab_embedding_backward_": lambda named: 2,  # a sort, and the sums
    "expert_routing_forward": lambda named: 2,
    "expert_order": lambda named: 3,
    "adamw_": lambda named: -(-len(named["main"]) // ADAMW_TENSORS),
    "sum_of_squares": lambda named: 1 + -(-len(named["tensors"]) // SQUARES_TENSORS),
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
}
