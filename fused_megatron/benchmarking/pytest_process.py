"""Test files run by pytest in a process of its own, whose environment chooses what serves the ops."""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_tests(
    paths: list[Path], environment: Mapping[str, str], *, options: Sequence[str] = (), timeout_s: float = 1200.0
) -> int:
    """Run pytest on files; the number of tests that passed.

    Args:
        paths: test files.
        environment: of the process, whole.
        options: further arguments of pytest.
        timeout_s: after which the process is killed.

    Raises:
        AssertionError: a test failed, the process died, or nothing ran; with the end of what it said.
    """
    # Only Python's output is captured: what a dying process writes (AddressSanitizer) must come through, after the
    # name of the test that it died in.
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--maxfail=3", "--capture=sys"]
    command += ["-p", "no:cacheprovider", "--disable-warnings", *options, *map(str, paths)]
    try:
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")
        raise AssertionError(f"not done after {timeout_s:.0f} s; the end of the output:\n{said[-2000:]}") from None
    failures = "\n".join(line for line in done.stdout.splitlines() if not re.search(r" (PASSED|SKIPPED) +\[", line))
    reason = f"exit code {done.returncode}" + (f" (signal {-done.returncode})" if done.returncode < 0 else "")
    died_in = "" if done.returncode >= 0 else f"; the last test: {done.stdout.strip().splitlines()[-1:]}"
    assert done.returncode == 0, f"{reason}{died_in}\n{failures[-8000:]}\n{done.stderr[-4000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, f"nothing ran:\n{done.stdout[-2000:]}"
    return int(passed.group(1))
