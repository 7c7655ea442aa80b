"""Trials on the GPUs of this machine: ops, the backend of dense attention, and two ranks with NCCL."""

import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused_megatron.checks import first_line
from fused_megatron.config import TrainConfig
from fused_megatron.doctor.facts import AttentionKernel, GpuTrials, TwoRanks
from fused_megatron.doctor.op_trials import try_ops
from fused_megatron.overlap.symmetric_memory import reaches
from fused_megatron.testing.run_on_ranks import RankError, run_on_ranks

ALL_REDUCE_BYTES = 64 << 20
"""Message of the trial of two ranks: large enough that its bytes decide its time."""
_REPEATS = 5
_TWO_RANKS_S = 60.0


def try_gpus(num_gpus: int, config: TrainConfig | None = None) -> GpuTrials:
    """Run all trials on the GPUs that torch sees; empty without one.

    Args:
        num_gpus: GPUs that torch sees.
        config: the run whose attention is asked about; None: common shapes.

    Communication: if there are two GPUs, two ranks of their own.
    """
    if not num_gpus:
        return GpuTrials()
    device = torch.device("cuda", 0)
    version = torch.backends.cudnn.version()
    return GpuTrials(
        ops=try_ops(device),
        attention=attention_backends(device, config),
        cudnn=None if version is None else cudnn_text(version),
        two_ranks=try_two_ranks("cuda") if num_gpus > 1 else None,
    )


def cudnn_text(version: int) -> str:
    """Return cuDNN's version as text: "9.20.0" of 92000, and "8.9.2" of 8902."""
    major, rest = divmod(version, 10_000 if version >= 90_000 else 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


def attention_backends(device: torch.device, config: TrainConfig | None = None) -> tuple[AttentionKernel, ...]:
    """Ask torch for the backend of dense causal attention, of a config's shape or of common ones."""
    if config is None:
        shapes = [(torch.bfloat16, 32, 32, 128), (torch.bfloat16, 32, 8, 128), (torch.float32, 32, 32, 128)]
    else:
        dtype = getattr(torch, config.for_device(device.type).training.weight_dtype)
        ranks, model = config.parallel.tensor_parallel_size, config.model
        shapes = [(dtype, model.num_heads // ranks, max(1, model.kv_heads // ranks), model.head_size)]
    found = []
    for dtype, heads, kv_heads, size in shapes:
        # As in training: with gradients, and [S, B, N, D] in memory.
        query, key = (
            torch.zeros(256, 1, each, size, dtype=dtype, device=device, requires_grad=True).permute(1, 2, 0, 3)
            for each in (heads, kv_heads)
        )
        backend, reason = sdpa_backend(query, key, causal=True)
        name = str(dtype).removeprefix("torch.")
        found.append(AttentionKernel(f"{name}, {heads} heads, {kv_heads} of keys, head_dim {size}", backend, reason))
    return tuple(found)


def sdpa_backend(query: torch.Tensor, key: torch.Tensor, *, causal: bool) -> tuple[str, str]:
    """Return the backend that torch.nn.functional.scaled_dot_product_attention chooses, and why it takes no other.

    Args:
        query: [B, N, S, D], with the dtype and on the device of the call.
        key: [B, G, S, D]; values have the same shape.
        causal: whether the call has is_causal.

    Returns:
        The name of the backend, such as "FLASH_ATTENTION"; and torch's reasons against the backends before it.
    """
    shared = query.shape[1] != key.shape[1]
    choice: int = torch._fused_sdp_choice(query, key, key, None, 0.0, causal, enable_gqa=shared)
    chosen = SDPBackend(choice)
    order = [SDPBackend(each) for each in torch._C._get_sdp_priority_order()]  # of this GPU, by torch
    before = order[: order.index(chosen)] if chosen in order else []
    refused = [f"not {other.name}: {_reason_against(other, query, key, causal, shared)}" for other in before]
    return chosen.name, "; ".join(refused) or "torch's first choice"


def _reason_against(backend: SDPBackend, query: torch.Tensor, key: torch.Tensor, causal: bool, shared: bool) -> str:
    """Return why a call cannot have a backend: torch says so when no other is allowed."""
    with warnings.catch_warnings(record=True) as caught, sdpa_kernel(backend):
        warnings.simplefilter("always")
        try:
            F.scaled_dot_product_attention(query, key, key, is_causal=causal, enable_gqa=shared)
        except RuntimeError as error:
            texts = [str(warning.message).split(" (Triggered")[0].strip() for warning in caught]
            # torch begins with a line that only says which backend it speaks of.
            said = [text for text in texts if text and not text.rstrip(":").endswith("not used because")]
            return " ".join(said)[:160] or first_line(error)[:160]
    return "it could run, but torch prefers the chosen one here"


def try_two_ranks(device_type: str) -> TwoRanks:
    """Time an all-reduce of two ranks, and let them map each other's memory: NCCL for "cuda", gloo for "cpu"."""
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    try:
        first, *_ = run_on_ranks(_all_reduce, 2, device_type, timeout_s=_TWO_RANKS_S, backend=backend)
    except RankError as error:
        causes = [each for each in error.errors.values() if each is not None]
        return TwoRanks(problem=first_line(causes[0] if causes else error)[:200])
    seconds, maps_memory = first
    # Each rank of two sends and receives the message once: bus bandwidth is bytes / time.
    return TwoRanks(gb_per_s=ALL_REDUCE_BYTES / seconds / 1e9, maps_memory=maps_memory)


def _all_reduce(rank: int, world_size: int, device_type: str) -> tuple[float, bool]:
    """Return the seconds of the fastest all-reduce, and whether the ranks map each other's memory."""
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    x = torch.full((ALL_REDUCE_BYTES // 4,), 0.5, device=device)
    seconds = []
    for _ in range(_REPEATS):
        x.fill_(0.5)
        _finish(device)
        begun = time.perf_counter()
        dist.all_reduce(x)
        _finish(device)
        seconds.append(time.perf_counter() - begun)
    if not bool((x == 0.5 * world_size).all()):
        raise RuntimeError("an all-reduce of two ranks gave a wrong sum")
    group: Any = dist.group.WORLD
    return min(seconds), reaches(group, device)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
