"""Validated reading of config.json, field by field: one clear line for a missing, malformed or unsupported field."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fused_megatron.checks import InputError, check

# Activation functions: transformers' name to ours.
GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact"}

# Larger than in any model, and small enough that the bytes of a tensor can be counted.
_LARGEST_SIZE = 1 << 24
_REQUIRED = object()
T = TypeVar("T")


class Settings:
    """The fields of a JSON object.

    Args:
        values: value by field name.
        source: name of the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value; the default if the field is missing or null."""
        value = self.values.get(name)
        return default if value is None else value

    def size(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a whole number of at least 1, or the default (which may be None)."""
        value = self._value(name, default)
        good = value is default or (type(value) is int and 1 <= value <= _LARGEST_SIZE)
        check(good, f"{self.source}: {name}={value!r:.60} must be a whole number from 1 to {_LARGEST_SIZE}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a finite float, or the default (which may be None)."""
        value = self._value(name, default)
        good = value is default or (isinstance(value, int | float) and not isinstance(value, bool))
        good = good and (value is default or abs(value) < math.inf)
        check(good, f"{self.source}: {name}={value!r:.60} must be a finite number")
        return float(value) if value is not default else value

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self._value(name, default)
        check(isinstance(value, bool), f"{self.source}: {name}={value!r:.60} must be true or false")
        return bool(value)

    def choice(self, name: str, meanings: Mapping[str, T], default: str) -> T:
        """Return the meaning of a string; raise if it has none."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in meanings:
            raise self.unsupported(name, value, list(meanings))
        return meanings[value]

    def require(self, name: str, default: Any, allowed: Sequence[Any]) -> None:
        """Raise if the field's value is not allowed, since our models lack the feature."""
        value = self.get(name, default)
        if value not in allowed:
            raise self.unsupported(name, value, allowed)

    def unsupported(self, name: str, value: Any, allowed: Sequence[Any]) -> InputError:
        """Make the error for a value that needs a feature that our models lack."""
        wanted = ", ".join(repr(value) for value in allowed)
        return InputError(f"{self.source}: {name}={value!r:.60} is not supported (supported: {wanted})")

    def _value(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        check(value is not _REQUIRED, f"{self.source}: the field {name} is missing")
        return value
