"""Ranks that succeed or fail together: results and errors are exchanged, so that no rank waits for one that gave up."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from fused_megatron.checks import InputError
from fused_megatron.collectives.gather_json import gather_json


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def run_on_first(
    group: dist.ProcessGroup | None, function: Callable[[], Any], failure: type[RuntimeError] = RuntimeError
) -> Any:
    """Run function on rank 0 only; every rank gets its result, or its error. As run_together."""
    rank, _ = rank_and_size(group)
    return run_together(group, lambda: function() if rank == 0 else None, failure)[0]


def run_together(
    group: dist.ProcessGroup | None, function: Callable[[], Any], failure: type[RuntimeError] = RuntimeError
) -> list[Any]:
    """Run function on every rank; every rank's JSON result, or the same one-line error raised on all ranks.

    Args:
        failure: the class that is raised for anything but an InputError.

    Raises:
        InputError, failure: on every rank, as soon as all are through, where any rank's function raised.
    """
    value, kind, message = None, None, ""
    cause: Exception | None = None
    try:
        value = function()
    except InputError as error:
        kind, message, cause = "input", str(error), error
    except failure as error:
        kind, message, cause = "failure", str(error), error
    except Exception as error:  # whatever it is: the others must hear of it, or they wait for ever
        kind, message, cause = "failure", f"{type(error).__name__}: {error}", error
    try:
        results = gather_json({"value": value, "kind": kind, "message": message}, group)
    except RuntimeError as error:  # the connection to a rank that was killed, or a time-out
        reason = str(error).strip().splitlines()[0]
        raise failure(f"another rank stopped while this one waited for it ({reason})") from error
    failed = [r for r, result in enumerate(results) if result["kind"]]
    if not failed:
        return [result["value"] for result in results]
    first = results[failed[0]]
    alike = all(result["message"] == first["message"] for result in results)  # every rank saw the same: it is no rank's
    where = "" if alike else f"rank {failed[0]}: "
    more = "" if alike or len(failed) == 1 else f" (and {len(failed) - 1} more of {len(results)} ranks failed)"
    error_class: type[InputError] | type[RuntimeError] = InputError if first["kind"] == "input" else failure
    shared = error_class(f"{where}{first['message']}{more}")
    shared.on_every_rank = True  # type: ignore[union-attr]
    raise shared from cause
