"""Runner of the mutations: it makes each edit in a copy of the tree, runs its tests, and reports unseen edits.

make mutants                        all of them
make mutants ARGS="dropout eps"     mutations whose name contains one of the words
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 900
_LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "__pycache__", ".*_cache", "results")


def main(words: list[str]) -> int:
    """Run the mutations; return the number of mutations that no test has seen."""
    chosen = [m for m in mutations() if not words or any(word in m.name for word in words)]
    unseen = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, symlinks=True, ignore=_LEFT_OUT)
        for number, mutation in enumerate(chosen, 1):
            begin = time.monotonic()
            verdict = try_in(tree, mutation)
            print(
                f"{number:3}/{len(chosen)}  {verdict:8}  {time.monotonic() - begin:4.0f} s  {mutation.name}", flush=True
            )
            unseen += [mutation.name] if verdict != "seen" else []
    print(f"{len(chosen) - len(unseen)} of {len(chosen)} were seen" + "".join(f"\n  not seen: {n}" for n in unseen))
    return len(unseen)


def mutations() -> tuple[Any, ...]:
    """Return the rows of the tables."""
    table = _module("table.py")
    others = [_module(path.name) for path in sorted(Path(__file__).parent.glob("table_of_*.py"))]
    return (*table.MUTATIONS, *(table.Mutation(*row) for other in others for row in other.MUTATIONS))


def _module(name: str) -> Any:
    """Load a file of this folder by its path: the tests are no package."""
    specification = importlib.util.spec_from_file_location(name.removesuffix(".py"), Path(__file__).with_name(name))
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def try_in(tree: Path, mutation: Any) -> str:
    """Return "seen" (a test failed), "hang" (not ended in time), "broken" (no test found), or "unseen" (all passed)."""
    path = tree / mutation.file
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(mutation.old, mutation.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *mutation.tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    # A session of its own, so that the ranks of a hanging test end with it.
    process = subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        code = process.wait(_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "hang"
    finally:
        path.write_text(before, encoding="utf-8")
    return {0: "unseen", 1: "seen"}.get(code, "broken")


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
