"""Change of an object's class, by which an object of another library gets methods for models in shards."""

from typing import Any


def become(instance: Any, kind: type) -> None:
    """Give an object the methods of a class, which override the methods of its own class."""
    own = type(instance)
    if issubclass(kind, own):
        instance.__class__ = kind
    elif not issubclass(own, kind):
        instance.__class__ = type(own.__name__, (kind, own), {"__module__": own.__module__, "__doc__": own.__doc__})
