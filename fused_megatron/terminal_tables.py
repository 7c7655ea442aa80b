"""Reports with Markdown tables, printed on a terminal as tables of its width and elsewhere as they are."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def print_report(text: str, console: Console | None = None) -> None:
    """Print a report: on a terminal its tables are drawn within the width, with cells that wrap; elsewhere, as it is.

    Args:
        text: lines, of which those that begin with "|" are rows of Markdown tables.
        console: the output; None: standard output.
    """
    console = Console(highlight=False) if console is None else console
    if not console.is_terminal:
        print(text)
        return
    rows: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append(line)
            continue
        if rows:
            console.print(_table(rows))
            rows = []
        console.print(line, markup=False)


def _table(rows: Sequence[str]) -> Table:
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    header, body = cells[0], [row for row in cells[1:] if not set("".join(row)) <= set("-: ")]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in body:
        table.add_row(*row)
    return table
