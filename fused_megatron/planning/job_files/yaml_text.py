"""YAML of plain values: mappings, lists, texts and numbers. All texts are quoted, so that none is read as a number."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def yaml_document(value: Mapping[str, Any]) -> str:
    """Return a mapping as a YAML document, its keys in their order.

    Args:
        value: of mappings, lists, texts, whole numbers and bools. A text with line breaks becomes a literal block.
    """
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Mapping[str, Any] | Sequence[Any]) -> Iterator[str]:
    """Yield the lines of a mapping or a list, without indentation."""
    pairs = value.items() if isinstance(value, Mapping) else ((None, item) for item in value)
    for key, item in pairs:
        start = "-" if key is None else f"{key}:"
        if isinstance(item, str) and "\n" in item:
            yield f"{start} |{'' if item.endswith(chr(10)) else '-'}"
            yield from (f"  {line}" if line else "" for line in item.removesuffix("\n").split("\n"))
        elif isinstance(item, Mapping | list) and item:
            inner = list(_lines(item))
            if key is None:
                yield f"- {inner[0]}"
                inner = inner[1:]
            else:
                yield start
            yield from (f"  {line}" if line else "" for line in inner)
        else:
            yield f"{start} {json.dumps(item)}"
