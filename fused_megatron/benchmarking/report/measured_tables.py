"""Tables of a benchmark, printed row by row and kept in a file, from which a page shows them."""

import datetime
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fused_megatron.benchmarking.report.page_tables import write_tables
from fused_megatron.observe.processor import processor_name


class MeasuredTables:
    """Tables of one run of a benchmark.

    Args:
        file: keeps the tables of the run, JSON, in docs/results.
        page: shows them, between marks of their names (report/page_tables.py).
        command: runs the benchmark.
    """

    def __init__(self, file: Path, page: Path, command: str) -> None:
        self._file, self._page = file, page
        self._run: dict[str, Any] = {
            "command": command,
            "page": page.name,
            "machine": f"{processor_name()}, {os.cpu_count()} cores",
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__.partition("+")[0],
            "tables": {},
        }

    def add(self, name: str, lines: Iterable[str], *, printed: bool = False) -> None:
        """Print lines as they come, and keep the rows of the table among them.

        Args:
            name: of the table's marks in the page.
            lines: rows of a table of Markdown, the names of the columns first, and other lines.
            printed: the lines have been printed.
        """
        rows = []
        for line in lines:
            if not printed:
                print(line, flush=True)
            if line.startswith("|") and not line.startswith("|-"):
                rows.append([cell.strip() for cell in line.strip("|").split("|")])
        self._run["tables"][name] = rows

    def write(self) -> None:
        """Write the file, and the tables of the page.

        Raises:
            ValueError: the page lacks the marks of a table; the file is written.
        """
        self._file.write_text(json.dumps(self._run, indent=1) + "\n", encoding="utf-8")
        write_tables(self._page, shown_tables(self._file))


def shown_tables(file: Path) -> dict[str, str]:
    """Return the tables of a file as Markdown, by the names of their marks; each says where it comes from."""
    run = json.loads(file.read_text(encoding="utf-8"))
    source = f"`docs/results/{file.name}`: {run['machine']}, {run['date']}, torch {run['torch']} (`{run['command']}`)."
    return {
        name: "\n".join([_line(rows[0]), "|---" * len(rows[0]) + "|", *map(_line, rows[1:]), "", source])
        for name, rows in run["tables"].items()
    }


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
