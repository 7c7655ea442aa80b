"""Ranks that succeed or fail together: results and errors are exchanged, so that no rank waits for one that gave up."""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fused_megatron.checks import InputError
from fused_megatron.training.checkpoint.errors import CheckpointError


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def gather_json(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value, in rank order, on every rank. JSON rather than all_gather_object, which pickles.

    Communication: two all-gathers, of 8 bytes and of the longest text.
    """
    if group is None:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
    size = dist.get_world_size(group)
    try:
        lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
        dist.all_gather(lengths, torch.tensor([text.numel()], dtype=torch.int64, device=device), group=group)
        longest = max(int(length.item()) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        padded[: text.numel()] = text
        texts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(texts, padded, group=group)
    except RuntimeError as error:  # the connection to a rank that was killed, or a time-out
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"another rank stopped while the checkpoint was in work ({reason})") from error
    return [json.loads(bytes(t[: int(n.item())].cpu().numpy())) for t, n in zip(texts, lengths, strict=True)]


def run_on_first(group: dist.ProcessGroup | None, function: Callable[[], Any]) -> Any:
    """Run function on rank 0 alone; every rank gets its result, or its error."""
    rank, _ = rank_and_size(group)
    return run_together(group, lambda: function() if rank == 0 else None)[0]


def run_together(group: dist.ProcessGroup | None, function: Callable[[], Any]) -> list[Any]:
    """Run function on every rank; every rank's JSON result, or the same one-line error raised on all ranks.

    Raises:
        InputError, CheckpointError: on every rank, as soon as all are through, where any rank's function raised.
    """
    value, kind, message = None, None, ""
    cause: Exception | None = None
    try:
        value = function()
    except InputError as error:
        kind, message, cause = "input", str(error), error
    except CheckpointError as error:
        kind, message, cause = "checkpoint", str(error), error
    except Exception as error:  # whatever it is: the others must hear of it, or they wait for ever
        kind, message, cause = "checkpoint", f"{type(error).__name__}: {error}", error
    results = gather_json({"value": value, "kind": kind, "message": message}, group)
    failed = [r for r, result in enumerate(results) if result["kind"]]
    if not failed:
        return [result["value"] for result in results]
    first = results[failed[0]]
    alike = all(result["message"] == first["message"] for result in results)  # every rank saw the same: it is no rank's
    where = "" if alike else f"rank {failed[0]}: "
    more = "" if alike or len(failed) == 1 else f" (and {len(failed) - 1} more of {len(results)} ranks failed)"
    error_class = InputError if first["kind"] == "input" else CheckpointError
    shared = error_class(f"{where}{first['message']}{more}")
    shared.on_every_rank = True
    raise shared from cause
