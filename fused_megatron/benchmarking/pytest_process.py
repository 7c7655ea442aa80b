"""Runner of test files in a pytest process of its own, whose environment selects the implementation of the ops."""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_tests(
    paths: list[Path], environment: Mapping[str, str], *, options: Sequence[str] = (), timeout_s: float = 1200.0
) -> int:
    """Run pytest on files and return the number of tests that passed.

    Args:
        paths: test files.
        environment: all environment variables of the process.
        options: further arguments of pytest.
        timeout_s: seconds after which the process is killed.

    Raises:
        AssertionError: a test failed, the process died, or nothing ran; the message has the end of the output.
    """
    # Capture only Python's output: the last words of a dying process (AddressSanitizer) must come through, after the
    # name of the test in which it died.
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--maxfail=3", "--capture=sys"]
    command += ["-p", "no:cacheprovider", "--disable-warnings", *options, *map(str, paths)]
    try:
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        raise AssertionError(f"not done after {timeout_s:.0f} s; the end of the output:\n{output[-2000:]}") from None
    failures = "\n".join(line for line in done.stdout.splitlines() if not re.search(r" (PASSED|SKIPPED) +\[", line))
    reason = f"exit code {done.returncode}" + (f" (signal {-done.returncode})" if done.returncode < 0 else "")
    died_in = "" if done.returncode >= 0 else f"; the last test: {done.stdout.strip().splitlines()[-1:]}"
    assert done.returncode == 0, f"{reason}{died_in}\n{failures[-8000:]}\n{done.stderr[-4000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, f"nothing ran:\n{done.stdout[-2000:]}"
    return int(passed.group(1))
