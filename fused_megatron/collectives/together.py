"""Agreement between ranks: they exchange values and errors, and succeed or fail together, so that none hangs."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from fused_megatron.checks import InputError, SharedError, SharedInputError, first_line
from fused_megatron.collectives.groups import Group, group_rank, group_size, is_fake
from fused_megatron.observe.waits import COMMUNICATION, wait_for

T = TypeVar("T")


class SharedFailure(SharedError, RuntimeError):
    """Failure of some ranks, raised on every rank."""


class Outcome(NamedTuple):
    """Result of one rank, known to all ranks.

    Attributes:
        value: result of the rank; None if it failed.
        error: text of the rank's error; None if it did not fail.
        is_input: whether the error is an InputError.
    """

    value: Any
    error: str | None
    is_input: bool


def gather_json(value: Any, group: Group) -> list[Any]:
    """Gather a JSON value from every rank, in rank order. JSON instead of all_gather_object, which pickles.

    In a fake group every rank has this rank's value.

    Raises:
        RuntimeError: a rank is gone or silent; raised by torch.distributed.

    Communication: two all-gathers, of 8 bytes and of the longest text.
    """
    if group is None or is_fake(group):
        return [value] * group_size(group)
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
    size = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([text.numel()], dtype=torch.int64, device=device), group=group)
    longest = max(int(length.item()) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: text.numel()] = text
    texts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(texts, padded, group=group)
    return [json.loads(bytes(t[: int(n.item())].cpu().numpy())) for t, n in zip(texts, lengths, strict=True)]


def sum_over_ranks_(x: torch.Tensor, group: Group) -> None:
    """Sum a few numbers over the ranks, in place, and wait. The process group itself carries them.

    Args:
        x: [..] float or int, contiguous.
        group: the ranks; None for this rank only.

    Communication: one all-reduce of x.
    """
    if group_size(group) > 1:
        wait_for(COMMUNICATION, lambda: dist.all_reduce(x, group=group))


def gather_outcomes(
    group: Group, value: Any, error: Exception | None, *, plain: tuple[type[Exception], ...] = (InputError,)
) -> list[Outcome]:
    """Gather a JSON value or an error from every rank, in rank order.

    Args:
        value: value of this rank; ignored if it has an error.
        error: error of this rank; None if it succeeded.
        plain: classes of errors whose text is the message only; for other errors the text begins with the class.

    Raises:
        RuntimeError: as gather_json.

    Communication: as gather_json.
    """
    own = Outcome(value, None, False)
    if error is not None:
        text = str(error) if isinstance(error, plain) else f"{type(error).__name__}: {error}"
        own = Outcome(None, text, isinstance(error, InputError))
    return [Outcome(*each) for each in gather_json(own, group)]


def failed_ranks(outcomes: Sequence[Outcome]) -> list[int]:
    """Return the ranks with an error."""
    return [rank for rank, outcome in enumerate(outcomes) if outcome.error is not None]


def shared_text(outcomes: Sequence[Outcome]) -> tuple[str, int]:
    """Return the error of the first rank that failed, and the number of other ranks that failed.

    The error names its rank, unless every rank has the same error; the number is 0 then.
    """
    failed = failed_ranks(outcomes)
    text = str(outcomes[failed[0]].error)
    if all(outcome.error == text for outcome in outcomes):
        return text, 0
    return f"rank {failed[0]}: {text}", len(failed) - 1


def run_on_first(group: Group, function: Callable[[], Any], failure: type[RuntimeError] = SharedFailure) -> Any:
    """Run function on rank 0 only, and return its result, or raise its error, on every rank. As run_together."""
    return run_together(group, lambda: function() if group_rank(group) == 0 else None, failure)[0]


def build_together(group: Group, build: Callable[[], T], failure: type[RuntimeError] = SharedFailure) -> T:
    """Return this rank's build(), which may be any object. If it raises on any rank, all raise. As run_together."""
    results: list[T] = []
    run_together(group, lambda: results.append(build()), failure)
    return results[0]


def run_together(group: Group, function: Callable[[], Any], failure: type[RuntimeError] = SharedFailure) -> list[Any]:
    """Run function on every rank; return the JSON results of all ranks, or raise the same one-line error on all.

    Without this a rank that fails would leave the others waiting in their next collective.

    Args:
        failure: class of the error for failures other than an InputError; a SharedError.

    Raises:
        SharedInputError, failure: function raised on some rank; raised on every rank, after all are through.
        RuntimeError: a rank is gone; raised on the other ranks. The class is the unshared base of `failure`
            (CheckpointError for SharedCheckpointError).

    Communication: as gather_json.
    """
    classes = (kind for kind in failure.__mro__ if issubclass(kind, RuntimeError) and not issubclass(kind, SharedError))
    of_one_rank: type[RuntimeError] = next(classes)
    value, cause = None, None
    try:
        value = function()
    except Exception as error:  # of any class: the other ranks must hear of it, or they wait for ever
        cause = error
    try:
        outcomes = gather_outcomes(group, value, cause, plain=(InputError, of_one_rank))
    except RuntimeError as lost:  # the connection to a rank that was killed, or a time-out
        reason = first_line(lost, name_type=False)
        raise of_one_rank(f"another rank stopped while this one waited for it ({reason})") from lost
    failed = failed_ranks(outcomes)
    if not failed:
        return [outcome.value for outcome in outcomes]
    text, others = shared_text(outcomes)
    more = f" (and {others} more of {len(outcomes)} ranks failed)" if others else ""
    raise (SharedInputError if outcomes[failed[0]].is_input else failure)(text + more) from cause
