"""Kernels of other libraries, if installed: Liger-Kernel, Apex, TransformerEngine, quack.

PEERS[op][provider] imports the library and returns a function of the benchmark's own arguments
(benchmarks/bench_<op>.py); it raises ImportError if the library is missing. A library that writes over its input gets a
copy, since all rounds and providers share the same input; its name says so.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

Op = Callable[..., Any]

_LAYER_NORM_EPS = 1e-5


def _liger() -> Any:
    return import_module("liger_kernel.transformers.functional")


def _liger_layer_norm() -> Op:
    library = _liger()
    return lambda x, weight, bias: library.liger_layer_norm(x, weight, bias, _LAYER_NORM_EPS)


def _apex_layer_norm() -> Op:
    library = import_module("apex.normalization.fused_layer_norm")
    return lambda x, weight, bias: library.fused_layer_norm_affine(x, weight, bias, x.shape[-1:], _LAYER_NORM_EPS)


def _with_parameters(module: Any, **parameters: torch.Tensor) -> Any:
    """Replace the module's parameters by the benchmark's tensors, so that these get the gradients."""
    for name, value in parameters.items():
        del module._parameters[name]
        setattr(module, name, value)
    return module


def _te_layer_norm() -> Op:
    library = import_module("transformer_engine.pytorch")
    made: list[Any] = []

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if not made:
            module = library.LayerNorm(x.shape[-1], eps=_LAYER_NORM_EPS, params_dtype=weight.dtype, device=x.device)
            made.append(_with_parameters(module, weight=weight, bias=bias))
        return made[0](x)

    return run


def _liger_rms_norm() -> Op:
    library = _liger()
    # With in_place=True it would write over the upstream gradient.
    return lambda x, weight: library.liger_rms_norm(x, weight, torch.finfo(x.dtype).eps, in_place=False)


def _apex_rms_norm() -> Op:
    library = import_module("apex.normalization.fused_layer_norm")
    return lambda x, weight: library.fused_rms_norm_affine(x, weight, x.shape[-1:], torch.finfo(x.dtype).eps)


def _te_rms_norm() -> Op:
    library = import_module("transformer_engine.pytorch")
    made: list[Any] = []

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not made:
            eps = torch.finfo(x.dtype).eps
            module = library.RMSNorm(x.shape[-1], eps=eps, params_dtype=weight.dtype, device=x.device)
            made.append(_with_parameters(module, weight=weight))
        return made[0](x)

    return run


def _quack_rms_norm() -> Op:
    library = import_module("quack.rmsnorm")
    return lambda x, weight: library.rmsnorm(x, weight, eps=torch.finfo(x.dtype).eps)


def _liger_add_rms_norm() -> Op:
    library = _liger()

    def run(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        return library.liger_fused_add_rms_norm(x, residual, weight, torch.finfo(x.dtype).eps, in_place=False)

    return run


def _quack_add_rms_norm() -> Op:
    library = import_module("quack.rmsnorm")

    def run(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        return library.rmsnorm(x, weight, residual=residual, eps=torch.finfo(x.dtype).eps, prenorm=True)

    return run


def _liger_swiglu() -> Op:
    library = _liger()
    return lambda x, bias=None: library.liger_swiglu(*(x if bias is None else x + bias).chunk(2, -1))


def _liger_geglu() -> Op:
    library = _liger()
    return lambda x, bias=None: library.liger_geglu(*(x if bias is None else x + bias).chunk(2, -1))


def _liger_rotary() -> Op:
    library = _liger()

    def run(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        # From [S, B, N, D] to its [B, N, S, D]; its tables hold every angle twice.
        tables = (torch.cat((t, t), -1)[None, : q.shape[0]] for t in (cos, sin))
        rotated = library.liger_rope(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), *tables)
        return tuple(t.permute(2, 0, 1, 3) for t in rotated)

    return run


def _apex_causal_softmax() -> Op:
    library = import_module("apex.transformer.functional.fused_softmax")

    def run(x: torch.Tensor, scale: float) -> torch.Tensor:
        return library.scaled_upper_triang_masked_softmax(x.flatten(0, -3), None, scale).view(x.shape)

    return run


def _liger_cross_entropy() -> Op:
    library = _liger()
    return lambda logits, target: library.liger_cross_entropy(logits.clone(), target)


def _apex_cross_entropy() -> Op:
    library = import_module("apex.contrib.xentropy")
    return lambda logits, target: library.SoftmaxCrossEntropyLoss.apply(logits, target, 0.0, -100, False).mean()


def _te_cross_entropy() -> Op:
    library = import_module("transformer_engine.pytorch.cross_entropy")
    return lambda logits, target: library.parallel_cross_entropy(logits.clone()[None], target[None], 0.0, True)


def _quack_cross_entropy() -> Op:
    library = import_module("quack.cross_entropy")
    return lambda logits, target: library.cross_entropy(logits, target)


def _liger_linear_cross_entropy() -> Op:
    library = _liger()
    return lambda hidden, weight, target: library.liger_fused_linear_cross_entropy(hidden, weight, target)


def _torch_linear_cross_entropy() -> Op:
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        raise ImportError("this torch has no linear_cross_entropy")
    return function


PEERS: dict[str, dict[str, Callable[[], Op]]] = {
    "layer_norm": {"liger": _liger_layer_norm, "apex": _apex_layer_norm, "transformer_engine": _te_layer_norm},
    "rms_norm": {
        "liger": _liger_rms_norm,
        "apex": _apex_rms_norm,
        "transformer_engine": _te_rms_norm,
        "quack": _quack_rms_norm,
    },
    "rms_norm + residual": {"liger": _liger_add_rms_norm, "quack": _quack_add_rms_norm},
    "bias_swiglu": {"liger": _liger_swiglu},
    "bias_geglu": {"liger": _liger_geglu},
    "rotary_embedding": {"liger": _liger_rotary},
    "scaled_masked_softmax": {"apex": _apex_causal_softmax},
    "cross_entropy": {
        "liger (of a copy)": _liger_cross_entropy,
        "apex": _apex_cross_entropy,
        "transformer_engine (of a copy)": _te_cross_entropy,
        "quack": _quack_cross_entropy,
    },
    "linear_cross_entropy": {"liger": _liger_linear_cross_entropy, "torch": _torch_linear_cross_entropy},
}
