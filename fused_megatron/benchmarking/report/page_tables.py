"""Tables of a page between two marks, which a command replaces: `<!-- name: begin -->` and `<!-- name: end -->`."""

from pathlib import Path


def table_between(text: str, name: str) -> str:
    """Return the table of this name.

    Raises:
        ValueError: the text has not both marks, each once.
    """
    return _parts(text, name)[1]


def write_tables(page: Path, tables: dict[str, str]) -> None:
    """Replace the tables of a page.

    Args:
        page: the file.
        tables: by the names of their marks; none ends with a new line.

    Raises:
        ValueError: the page has not both marks of a table; it stays as it is.
    """
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        head, _, rest = _parts(text, name)
        text = f"{head}{table}{rest}"
    page.write_text(text, encoding="utf-8")


def _parts(text: str, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"name={name}: the page must have the lines <!-- {name}: begin --> and <!-- {name}: end -->")
    head, _, rest = text.partition(begin)
    table, _, rest = rest.partition(end)
    return head + begin, table, end + rest
