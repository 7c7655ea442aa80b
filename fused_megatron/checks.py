"""Checks of user input. Every message has the same form: name=value, what is wanted, the way out."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that touch no tensor start without torch
    import torch


_NUM_NEAR = 3
# Divisors of larger numbers are not searched for a message.
_MOST_SEARCHED = 1 << 20


class SharedError(Exception):
    """Base class of errors that every rank raises with the same text, so that only one rank needs to print it."""


class InputError(ValueError):
    """A mistake in user input (argument, config, file): one clear line; the CLI exits with code 2."""


class SharedInputError(SharedError, InputError):
    """An InputError that every rank raises."""


@contextlib.contextmanager
def found_on_every_rank() -> Iterator[None]:
    """Context for checks that every rank makes of the same input: an InputError becomes a SharedInputError."""
    try:
        yield
    except InputError as error:
        raise SharedInputError(str(error)) from error


def check(condition: bool, message: str) -> None:
    """Raise InputError(message) unless condition holds."""
    if not condition:
        raise InputError(message)


def check_positive(name: str, value: int) -> None:
    """Raise InputError unless value is 1 or more."""
    check(value >= 1, f"{name}={value} must be 1 or more")


def check_divisible(name: str, value: int, divisor_name: str, divisor: int, *, either: bool = False) -> None:
    """Raise InputError unless value is a multiple of divisor; the message names the nearest multiples.

    either: the user can change the divisor as well, so the message names its nearest values, too.
    """
    if value % divisor:
        below, above = value // divisor * divisor, -(-value // divisor) * divisor
        nearest = ", ".join(str(v) for v in (below, above) if v > 0)
        if either:
            fits = [v for v in range(1, min(value, _MOST_SEARCHED) + 1) if value % v == 0]
            nearest += _or_other(divisor_name, divisor, fits)
        raise InputError(f"{name}={value} must be divisible by {divisor_name}={divisor} (nearest: {nearest})")


def _or_other(name: str, value: int, fits: Sequence[int]) -> str:
    """Return the nearest values of the other number that fit, as a second way out."""
    near = [*[v for v in fits if v < value][-1:], *[v for v in fits if v > value][:1]]
    return f"; or {name}={' or '.join(map(str, near))}" if near else ""


def check_multiple_or_divisor(name: str, value: int, other_name: str, other: int, *, either: bool = False) -> None:
    """Raise InputError unless one number is a multiple of the other; the message names the nearest valid values.

    either: as check_divisible.
    """
    if value % other and other % value:
        fits = [v for v in range(1, 2 * max(value, other) + 1) if v % other == 0 or other % v == 0]
        nearest = f"{max(v for v in fits if v < value)}, {min(v for v in fits if v > value)}"
        if either:
            others = [v for v in range(1, 2 * max(value, other) + 1) if v % value == 0 or value % v == 0]
            nearest += _or_other(other_name, other, others)
        raise InputError(f"{name}={value} must divide {other_name}={other}, or be divisible by it (nearest: {nearest})")


def check_one_of(name: str, value: str, allowed: Sequence[str], all_names: str = "") -> None:
    """Raise InputError unless value is one of the allowed strings.

    Args:
        name: of the value.
        value: given.
        allowed: strings.
        all_names: where a reader finds all of them, if they are too many for a line; the message then has the nearest.
    """
    if value in allowed:
        return
    if not all_names:
        raise InputError(f"{name}={value!r:.60} must be one of: {', '.join(map(repr, allowed))}")
    near = ", ".join(difflib.get_close_matches(value[:200], allowed, _NUM_NEAR, cutoff=0.0))
    raise InputError(f"{name}={value!r:.60} must be one of {len(allowed)} names (nearest: {near}; all: {all_names})")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype as users write it: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def first_line(error: BaseException, *, name_type: bool = True) -> str:
    """Return the error's type and the first line of its message; the type only if there is no message."""
    kind = type(error).__name__
    lines = str(error).strip().splitlines()
    if not lines:
        return kind
    return f"{kind}: {lines[0]}" if name_type else lines[0]


def has_values(tensor: torch.Tensor) -> bool:
    """Return whether the tensor has values: a meta tensor or a fake tensor has only a shape."""
    return not tensor.is_meta and getattr(tensor, "fake_mode", None) is None


def check_shape(name: str, tensor: torch.Tensor, expected: Sequence[int]) -> None:
    """Raise InputError unless tensor has exactly the expected shape."""
    if tuple(tensor.shape) != tuple(expected):
        raise InputError(f"{name}.shape={tuple(tensor.shape)} must be {tuple(expected)}")


def check_dtype(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless the dtype of tensor is one of the allowed dtypes."""
    if tensor.dtype not in allowed:
        wanted = ", ".join(map(dtype_name, allowed))
        raise TypeError(f"{name}.dtype={dtype_name(tensor.dtype)} must be one of: {wanted}")


def check_same_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise InputError unless both tensors are on the same device."""
    if tensor.device != other.device:
        raise InputError(f"{name}.device={tensor.device} must equal {other_name}.device={other.device}")
