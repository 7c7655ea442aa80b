"""Sequence length and batch with which an imported model starts to train on the machine at hand."""

import dataclasses

import torch

from fused_megatron.config import TrainConfig
from fused_megatron.observe.free_memory import memory_bytes
from fused_megatron.planning.rank_memory import rank_memory
from fused_megatron.training.memory_check import checkpoint_copy_bytes

# Share of the free memory that a run may plan with: allocators round up, and other programs live here, too.
_USED_SHARE = 0.8
# Multiplications and additions of a step that take about a minute on a processor, and a few seconds on a GPU.
_STEP_FLOPS = {"cpu": 4e12, "cuda": 1e15}
_SHORTEST = 128


def config_of_this_machine(
    config: TrainConfig, device_type: str | None = None, free_bytes: float | None = None
) -> tuple[TrainConfig, str]:
    """Return the config with a length and a batch that one rank of this machine can train, and a line that says why.

    The length is halved until the step fits the memory and takes about a minute at most; then the batch. A learned
    table of positions fixes the length. The line is "" if nothing changed.

    Args:
        config: with the full length of the model; model.vocab_size must be given.
        device_type: "cpu" or "cuda"; None: "cuda" if there is one.
        free_bytes: free memory of the device; None: what it has now.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if free_bytes is None:
        free_bytes = float(torch.cuda.mem_get_info()[0]) if device_type == "cuda" else memory_bytes()[1]
    found = config
    while not _starts(found, device_type, free_bytes):
        model, training = found.model, found.training
        if model.position == "rotary" and model.seq_len > _SHORTEST:
            found = dataclasses.replace(
                found, model=dataclasses.replace(model, seq_len=max(_SHORTEST, model.seq_len // 2))
            )
        elif training.global_batch_size > training.microbatch_size:
            halved = max(training.microbatch_size, training.global_batch_size // 2)
            found = dataclasses.replace(found, training=dataclasses.replace(training, global_batch_size=halved))
        elif training.async_checkpoint and device_type == "cpu":
            found = dataclasses.replace(found, training=dataclasses.replace(training, async_checkpoint=False))
        else:
            break
    if found == config:
        return config, ""
    reason = f"one {device_type} rank with {free_bytes / 1e9:.0f} GB free starts with seq_len={found.model.seq_len}"
    return found, (
        f"{reason}, global_batch_size={found.training.global_batch_size} (full length of the model: "
        f"{config.model.seq_len})"
    )


def _starts(config: TrainConfig, device_type: str, free_bytes: float) -> bool:
    memory = rank_memory(config.for_device(device_type), device=device_type)
    needed = float(memory.total)
    if device_type == "cpu":
        needed += checkpoint_copy_bytes(config, memory.num_parameters, 1)
    # A product with a weight costs 2 operations an element forward, and 4 backward.
    flops = 6.0 * memory.num_parameters * config.model.seq_len * config.training.global_batch_size
    return needed <= _USED_SHARE * free_bytes and flops <= _STEP_FLOPS[device_type]
