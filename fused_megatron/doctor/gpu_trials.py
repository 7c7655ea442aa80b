"""Trials on the GPUs of this machine: ops, the backend of dense attention, and two ranks with NCCL."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend

from fused_megatron.checks import first_line
from fused_megatron.config import TrainConfig
from fused_megatron.doctor.facts import AttentionKernel, GpuTrials, TwoRanks
from fused_megatron.doctor.op_trials import try_ops
from fused_megatron.overlap.symmetric_memory import reaches
from fused_megatron.testing.run_on_ranks import RankError, run_on_ranks

ALL_REDUCE_BYTES = 64 << 20
"""Message of the trial of two ranks: large enough that its time is that of its bytes."""
_REPEATS = 5
_TWO_RANKS_S = 60.0
# Whether torch's backend can run a call, with its reasons as warnings. Math runs any call.
_CAN_USE: dict[str, Callable[..., bool]] = {
    "FLASH_ATTENTION": torch.backends.cuda.can_use_flash_attention,
    "EFFICIENT_ATTENTION": torch.backends.cuda.can_use_efficient_attention,
    "CUDNN_ATTENTION": torch.backends.cuda.can_use_cudnn_attention,
}


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
        query = torch.empty(1, heads, 256, size, dtype=dtype, device=device)
        key = torch.empty(1, kv_heads, 256, size, dtype=dtype, device=device)
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
    name = SDPBackend(choice).name
    order = [SDPBackend(each).name for each in torch._C._get_sdp_priority_order()]  # of this GPU, by torch
    before = order[: order.index(name)] if name in order else []
    call = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, causal, shared)
    refused = []
    for other in before:
        can_use = _CAN_USE.get(other)
        if can_use is None:
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            can_use(call, debug=True)
        said = [str(warning.message).split(" (Triggered")[0].strip() for warning in caught]
        refused.append(f"not {other}: {' '.join(said)[:160] or 'torch gives no reason'}")
    return name, "; ".join(refused) or "torch's first choice"


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
