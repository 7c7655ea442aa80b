"""Kernels and collectives of a layer of megatron-core, counted as ours are in docs/gpu_step.md.

    pip install megatron-core
    python benchmarks/megatron_kernels.py [--hidden 4096 --heads 32 --seq-len 4096 --tp 2] [--fused-gradients]

Its GPTModel runs forward and backward with one and with two layers, on the meta device with a fake process group; the
difference is a layer. It runs the local layers, since TransformerEngine and Apex need a GPU. Four things differ from a
run of them, each in favour of megatron-core: attention is torch's FlashAttention, as TransformerEngine has; a function
that it gives to torch.compile counts as one kernel; torch's LayerNorm, of which a backward counts as one kernel, stands
for Apex's under sequence parallelism; its DistributedDataParallel adds a gradient to main_grad by one kernel for each
parameter, and with --fused-gradients by none for the four weights, as Apex's extension does.
"""

import argparse
import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from gpt_of_libraries import on_the_cpu
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_megatron.observe.kernel_counts import (
    ACTIVATION,
    KINDS,
    OTHER,
    RESIDUAL,
    AttentionOfAGPU,
    kernels_of,
)
from fused_megatron.observe.record_communication import transfer_of
from fused_megatron.planning.recorded_step import fake_ranks

_FUSED = {"bias_gelu": ACTIVATION, "bias_gelu_back": ACTIVATION, "bias_dropout_add_fused_train": RESIDUAL}


class Counts(TorchDispatchMode):
    """Launches and bytes by kind of kernel, and calls by kind of collective."""

    current: "Counts | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.paused = False

    def __enter__(self) -> "Counts":
        Counts.current = self
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.collectives[transfer_of(func.overloadpacket.__name__, args).kind] += 1
        results = func(*args, **(kwargs or {}))
        kernels = kernels_of(func, args, kwargs or {}, results)
        if kernels is not None and not self.paused:
            self.launches[kernels.kind] += kernels.launches
            self.moved[kernels.kind] += kernels.num_bytes
        return results


def compiled(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Stand in for torch.compile: the function counts as one kernel that reads its arguments and writes its results."""
    if function is None:
        return compiled

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        counts, before = Counts.current, Counts.current is not None and Counts.current.paused
        if counts is not None:
            counts.paused = True
        results = function(*args, **kwargs)
        if counts is not None and not before:
            counts.paused = False
            kind = _FUSED.get(function.__name__, OTHER)
            counts.launches[kind] += 1
            tensors = [t for t in (*args, results) if isinstance(t, torch.Tensor)]
            tensors += [t for pair in args if isinstance(pair, tuple) for t in pair if isinstance(t, torch.Tensor)]
            counts.moved[kind] += sum(tensor.nbytes for tensor in tensors)
        return results

    return call


class Flash(nn.Module):
    """Core attention with the interface of megatron-core's."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> torch.Tensor:
        y = F.scaled_dot_product_attention(*(t.permute(1, 2, 0, 3) for t in (query, key, value)), is_causal=True)
        return y.permute(2, 0, 1, 3).flatten(2)


def layer_norm(_: type, config: Any, hidden_size: int, eps: float = 1e-5, **__: Any) -> nn.Module:
    """Build the norm that WrappedTorchNorm refuses to be under sequence parallelism."""
    norm = nn.LayerNorm(hidden_size, eps, dtype=config.params_dtype)
    for parameter in norm.parameters():
        parameter.sequence_parallel = True  # type: ignore[attr-defined]
    return norm


def counted(options: argparse.Namespace, num_layers: int) -> tuple[Counts, Counts]:
    """Run forward and backward of a model and return their counts."""
    gpt, specs = (import_module(f"megatron.core.models.gpt{part}") for part in ("", ".gpt_layer_specs"))
    config = import_module("megatron.core.transformer").TransformerConfig(
        num_layers=num_layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        tensor_model_parallel_size=options.tp,
        sequence_parallel=options.tp > 1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
        init_model_with_meta_device=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    spec = specs.get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = Flash
    with torch.device("meta"):
        model = gpt.GPTModel(config, spec, 256 * options.tp, options.seq_len, share_embeddings_and_output_weights=True)
        model.bfloat16()  # as Float16Module
        for parameter in model.parameters():
            into_main_grad(parameter, fused=options.fused_gradients and parameter.dim() == 2)
        tokens = torch.zeros(1, options.seq_len, dtype=torch.int64)
        mask = torch.ones(1, 1, options.seq_len, options.seq_len, dtype=torch.bool)
        with AttentionOfAGPU(), Counts() as forward:
            loss = model(tokens, tokens, mask, labels=tokens).sum()
        with torch.autograd.set_multithreading_enabled(False), Counts() as backward:
            loss.backward()
    return forward, backward


def into_main_grad(parameter: nn.Parameter, fused: bool) -> None:
    """Add each gradient to a float32 main_grad, as the hook of its DistributedDataParallel does."""
    main_grad = torch.zeros_like(parameter, dtype=torch.float32)

    def add(updated: torch.Tensor) -> None:
        if not fused:
            main_grad.add_(updated.grad)
        updated.grad = None

    parameter.register_post_accumulate_grad_hook(add)


@contextlib.contextmanager
def on_the_meta_device(tp: int) -> Iterator[None]:
    """Let megatron-core take the meta device for a GPU, in a fake group of tp ranks."""
    with fake_ranks(0, tp), patch("torch.compile", compiled), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module("megatron.core.parallel_state").initialize_model_parallel(tp, create_gloo_process_groups=False)
        norm = import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
        on_meta = patch("torch.cuda.current_device", lambda: torch.device("meta"))
        with on_the_cpu(), on_meta, patch.object(norm, "__new__", layer_norm):
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 4096), ("heads", 32), ("seq-len", 4096), ("tp", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--fused-gradients", action="store_true", help="products add the weights' gradients to main_grad"
    )
    options = parser.parse_args()
    with on_the_meta_device(options.tp):
        one, two = counted(options, 1), counted(options, 2)
    version = import_module("megatron.core").__version__
    print(f"a layer of megatron-core {version}: launches / MB")
    for direction, few, more in zip(("forward", "backward"), one, two, strict=True):
        launches, moved, calls = (
            getattr(more, name) - getattr(few, name) for name in ("launches", "moved", "collectives")
        )
        shown = [f"{kind} {launches[kind]} / {moved[kind] / 1e6:,.0f}" for kind in KINDS if launches[kind]]
        print(f"{direction}: {launches.total()} / {moved.total() / 1e6:,.0f}: {', '.join(shown)}; {dict(calls)}")


if __name__ == "__main__":
    main()
