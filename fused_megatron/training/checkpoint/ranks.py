"""Ranks that succeed or fail together: results and errors are exchanged, so that no rank waits for one that gave up."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from fused_megatron.checks import InputError
from fused_megatron.collectives.gather_json import gather_json as collectives_gather_json
from fused_megatron.training.checkpoint.errors import CheckpointError


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def gather_json(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """collectives.gather_json, for which a rank that is gone is a fault of the checkpoint."""
    try:
        return collectives_gather_json(value, group)
    except RuntimeError as error:  # the connection to a rank that was killed, or a time-out
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"another rank stopped while the checkpoint was in work ({reason})") from error


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
