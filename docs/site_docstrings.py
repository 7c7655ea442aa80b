"""Paragraphs of docstrings on the site: `Communication: bytes ...` stays a paragraph.

griffe reads the docstrings for the site. It takes a paragraph that opens with a word and a colon for a box, and the
rest of the first line for the title of the box.
"""

import re
from typing import Any

import griffe

_PARAGRAPH = re.compile(r"^([A-Z][A-Za-z -]*): (\S.*(?:\n +\S.*)*)", flags=re.MULTILINE)


class Paragraphs(griffe.Extension):
    """Paragraphs with their first word in bold, in place of boxes."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of each object that has one."""
        if obj.docstring:
            obj.docstring.value = _PARAGRAPH.sub(paragraph, obj.docstring.value)


def paragraph(match: re.Match[str]) -> str:
    """Return a paragraph without its indentation."""
    return f"**{match[1]}.** " + re.sub(r"\n +", "\n", match[2])
