"""Fault injections of `make faults`: into checkpoints, datasets and ranks, with the outcome in each system.

    make faults                               all, some minutes; writes the tables of docs/reliability.md
    make faults ARGS="--only 'flipped bit'"   the faults whose title has this text; writes their rows anew

Rows are written anew only beside others of the same versions.

Each cell is what was seen in this run, after that fault, on this machine: nothing is copied from elsewhere. What is not
installed, or needs root, is said in the cell. megatron-core is no dependency: pip install megatron-core.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import checkpoint_faults
import dataset_faults
import rank_faults
from outcomes import NotHere, Outcome

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- make faults writes from here on -->", "<!-- to here -->"
SECTIONS: dict[str, dict[str, dict[str, Outcome]]] = {
    "Checkpoints": checkpoint_faults.FAULTS,
    "Token datasets": dataset_faults.FAULTS,
    "Ranks": rank_faults.FAULTS,
}
NOT_HERE, NONE = "not run here", "-"
WITH = "Seen with "
Cells = dict[str, dict[str, str]]
"""By fault and system."""

_PACKAGES = ("torch", "safetensors", "megatron-core", "numpy")


def main() -> int:
    """Run them; the exit code: 0 done, 1 where an injection itself did not work, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", default="", help="faults whose title has this text")
    parser.add_argument("--page", type=Path, default=PAGE, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = {
        title: {fault: cells for fault, cells in faults.items() if options.only in fault}
        for title, faults in SECTIONS.items()
    }
    count = sum(map(len, chosen.values()))
    if not count:
        print(f"no fault has {options.only!r} in its title: {'; '.join(f for each in SECTIONS.values() for f in each)}")
        return 2
    kept = read_page(options.page) if options.only else {}
    if kept is None:
        print(
            f"{os.path.relpath(options.page)} was written with other versions than {versions()}: run make faults whole"
        )
        return 2
    begun = time.monotonic()
    try:
        cells, broken = run(chosen, count)
    except KeyboardInterrupt:
        print("\ninterrupted: the page is as it was")
        return 130
    print(f"\n{count} faults after {(time.monotonic() - begun) / 60:.1f} min", flush=True)
    write_page(options.page, {**kept, **cells})
    print(f"{os.path.relpath(options.page)}: {count} rows are new")
    return 1 if broken else 0


def run(chosen: dict[str, dict[str, dict[str, Outcome]]], count: int) -> tuple[Cells, bool]:
    """The cells by fault and system; whether an injection did not work."""
    cells: Cells = {}
    broken = False
    for fault, systems in (each for faults in chosen.values() for each in faults.items()):
        print(f"\n[{len(cells) + 1}/{count}] {fault}", flush=True)
        cells[fault] = {}
        for system, inject in systems.items():
            cell, works = cell_of(inject)
            print(f"  {system}: {cell}", flush=True)
            cells[fault][system] = cell
            broken |= not works
    return cells, broken


def cell_of(inject: Outcome) -> tuple[str, bool]:
    """What is seen; False where the injection itself failed."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        try:
            return inject(Path(folder)), True
        except NotHere as missing:
            return f"{NOT_HERE}: {missing}", True
        except (RuntimeError, OSError, AssertionError) as error:
            return f"THE INJECTION FAILED: {type(error).__name__}: {error}", False


def tables(cells: Cells) -> str:
    """The part of the page that this command writes."""
    lines = [f"{WITH}{versions()}; the latest row on {time.strftime('%Y-%m-%d')}.", ""]
    for title, faults in SECTIONS.items():
        columns = list(dict.fromkeys(system for systems in faults.values() for system in systems))
        lines += [f"### {title}", "", "| fault | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for fault in faults:
            row = cells.get(fault, {})
            lines.append(f"| {fault} | " + " | ".join(row.get(column, NONE) for column in columns) + " |")
        lines.append("")
    return "\n".join(lines)


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def write_page(page: Path, cells: Cells) -> None:
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables(cells)}\n{END}{after}", encoding="utf-8")


def read_page(page: Path, with_versions: str | None = None) -> Cells | None:
    """Return the cells of the page; None if they were observed with other versions than the present ones."""
    written = page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    if written.strip() and f"{WITH}{with_versions or versions()};" not in written:
        return None
    rows = [line.removeprefix("| ").removesuffix(" |") for line in written.splitlines() if line.startswith("| ")]
    cells: Cells = {}
    columns: list[str] = []
    for first, *others in (row.split(" | ") for row in rows):
        if first == "fault":
            columns = others
        else:
            cells[first] = {s: cell for s, cell in zip(columns, others, strict=True) if cell != NONE}
    return cells


if __name__ == "__main__":
    sys.exit(main())
