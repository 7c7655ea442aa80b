"""The `make bench` run: ops, short forms of layers and training steps, and one report of all.

    python benchmarks/run_all.py                    about ten minutes and 6 GB of memory on two idle cores
    python benchmarks/run_all.py -k layer_norm      some of the ops, with pytest's own options

Each part writes its results after every case: Ctrl-C ends the current part, keeps its results, and starts no other.
"""

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
# Title, approximate minutes on two cores, and the command of the part.
PARTS = (
    ("ops", 6, ("pytest", "-q", str(FOLDER))),
    ("layers", 1, (str(FOLDER / "layers.py"), "--short")),
    ("end to end", 2, (str(FOLDER / "end_to_end.py"), "--short")),
)
_PART = "FUSED_MEGATRON_BENCH_PART"


def main(words: Sequence[str]) -> int:
    """Run all parts, or only the ops with options for pytest; return the exit code."""
    if _PART in os.environ:
        return run_here(words)
    if words:
        code, interrupted = run_apart(["pytest", "-q", str(FOLDER), *words])
        return 130 if interrupted else code
    begun, codes, interrupted = time.time(), {}, False
    for number, (title, minutes, part) in enumerate(PARTS, 1):
        print(f"\n== {title}, part {number} of {len(PARTS)}: about {minutes} min on an idle machine", flush=True)
        codes[title], interrupted = run_apart(part)
        if interrupted:
            break
    print(f"\n== all, after {(time.time() - begun) / 60:.1f} min\n", flush=True)
    report(begun)
    failed = [title for title, code in codes.items() if code]
    if interrupted:
        print("interrupted: the files have what was measured before that")
        return 130
    print(f"failed: {', '.join(failed)} (see above)" if failed else "every part ran to its end")
    return 1 if failed else 0


def run_apart(words: Sequence[str]) -> tuple[int, bool]:
    """Run a part in a separate process, which gets Ctrl-C too; return (exit code, whether Ctrl-C came)."""
    process = subprocess.Popen([sys.executable, __file__, *words], env={**os.environ, _PART: "1"})
    interrupted = False
    while True:
        try:
            return process.wait(), interrupted
        except KeyboardInterrupt:
            interrupted = True


def run_here(words: Sequence[str]) -> int:
    """Run a part in this process. Ctrl-C gives one line, also during the import of a library."""
    sys.argv = list(words)
    try:
        if words[0] != "pytest":
            sys.path.insert(0, str(FOLDER))
            runpy.run_path(words[0], run_name="__main__")
            return 0
        import pytest  # noqa: PLC0415 - after Ctrl-C is handled

        return int(pytest.main(list(words[1:])))
    except KeyboardInterrupt:
        print("\ninterrupted", flush=True)
        return 130


def report(since: float) -> None:
    """Print the tables of the files that were written since then, and draw their pictures."""
    from fused_megatron.benchmarking.report.plots import plot_results  # noqa: PLC0415
    from fused_megatron.benchmarking.report.results_file import read_results  # noqa: PLC0415
    from fused_megatron.benchmarking.report.tables import results_lines  # noqa: PLC0415
    from fused_megatron.checks import InputError  # noqa: PLC0415 - torch takes seconds to import

    paths = sorted(path for path in RESULTS.glob("*.json") if path.stat().st_mtime >= since)
    try:
        for path in paths:
            print("\n".join(results_lines(read_results(path), brief=True)), end="\n\n")
        for path in paths:
            drawn = plot_results(read_results(path), RESULTS / "plots")
            print(f"{os.path.relpath(path)}\n" + "".join(f"  {os.path.relpath(one)}\n" for one in drawn), end="")
    except InputError as error:
        print(error)
    if paths:
        shown = " ".join(os.path.relpath(path) for path in paths)
        print(f"\nfused-megatron report {shown}   shows milliseconds, memory and limits of the ops too")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("interrupted")
