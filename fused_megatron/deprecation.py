"""Old names of arguments and classes, which keep working for one release and warn.

Every warning is a DeprecationWarning that names the new name and the release that drops the old one. It points at the
line of the user who wrote the old name, also where torch stands between the user and the function (model(...) calls
forward), since Python shows such a warning only for the user's own lines.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def warn_renamed(old: str, new: str, removed_in: str) -> None:
    """Warn that `old` is now called `new`, at the line that called the caller of this function."""
    level, frame = 3, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
        level, frame = level + 1, frame.f_back
    text = f"{old} is now called {new}; the old name goes in release {removed_in}"
    warnings.warn(text, DeprecationWarning, stacklevel=level)


def renamed_argument(
    *, old: str, new: str, removed_in: str = "0.2"
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Return a decorator whose function takes the keyword `old` for its argument `new`, and warns.

    Raises TypeError, when called, if both keywords are given. Decorate once for each renamed argument.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def accept_old_name(*args: Any, **keywords: Any) -> Result:
            if old in keywords:
                name = function.__qualname__
                if new in keywords:
                    raise TypeError(f"{name}() got {old}= and {new}=: {old} is the old name of {new}; give {new}= only")
                warn_renamed(f"{old}= of {name}()", f"{new}=", removed_in)
                keywords[new] = keywords.pop(old)
            return function(*args, **keywords)

        return accept_old_name

    return decorate


def renamed_names(module: str, names: Mapping[str, str], removed_in: str = "0.2") -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose members have new names.

        __getattr__ = renamed_names(__name__, {"OldClass": "NewClass"})

    Args:
        module: `__name__` of the module, which defines or imports the new names.
        names: new name of each old name.
        removed_in: the release without the old names.
    """

    def read(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", names[name], removed_in)
        return getattr(sys.modules[module], names[name])

    return read
