"""config.json, read field by field, with one clear line for what is missing, malformed or not supported."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fused_megatron.checks import InputError, check

# What activation functions are called there, and here.
GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact"}

# Beyond any model; tensors of such sizes still have a number of bytes.
_LARGEST_SIZE = 1 << 24
_REQUIRED = object()
W = TypeVar("W")


class Settings:
    """The values of a JSON object.

    Args:
        values: by field.
        source: the file that they come from, for messages.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def get(self, name: str, default: Any = None) -> Any:
        """The value; the default where there is none, or null."""
        value = self.values.get(name)
        return default if value is None else value

    def size(self, name: str, default: Any = _REQUIRED) -> Any:
        """A whole number of at least 1, or the default (None may be one)."""
        value = self._value(name, default)
        good = value is default or (type(value) is int and 1 <= value <= _LARGEST_SIZE)
        check(good, f"{self.source}: {name}={value!r:.60} must be a whole number from 1 to {_LARGEST_SIZE}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A float, or the default (None may be one)."""
        value = self._value(name, default)
        good = value is default or (isinstance(value, int | float) and not isinstance(value, bool))
        good = good and (value is default or abs(value) < math.inf)
        check(good, f"{self.source}: {name}={value!r:.60} must be a finite number")
        return float(value) if value is not default else value

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._value(name, default)
        check(isinstance(value, bool), f"{self.source}: {name}={value!r:.60} must be true or false")
        return bool(value)

    def choice(self, name: str, meanings: Mapping[str, W], default: str) -> W:
        """What a word means; a word without a meaning is refused by name."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in meanings:
            raise self.unsupported(name, value, list(meanings))
        return meanings[value]

    def require(self, name: str, default: Any, allowed: Sequence[Any]) -> None:
        """Refuse a field whose value would need what our models do not have."""
        value = self.get(name, default)
        if value not in allowed:
            raise self.unsupported(name, value, allowed)

    def unsupported(self, name: str, value: Any, allowed: Sequence[Any]) -> InputError:
        """The error for a feature that our models do not have."""
        wanted = ", ".join(repr(one) for one in allowed)
        return InputError(f"{self.source}: {name}={value!r:.60} is not supported (supported: {wanted})")

    def _value(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        check(value is not _REQUIRED, f"{self.source}: the field {name} is missing")
        return value
