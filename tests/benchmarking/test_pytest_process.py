"""Start here when tests in a process of their own fail without a message, or pass without running."""

import os
from pathlib import Path

import pytest

from fused_megatron.benchmarking.pytest_process import run_tests

# Other plugins of pytest take most of its start time.
ENVIRONMENT = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def written(folder: Path, body: str) -> list[Path]:
    file = folder / "test_it.py"
    file.write_text(body)
    return [file]


def test_counts_what_passed(tmp_path):
    body = "import os\n\ndef test_one():\n    assert os.environ['WHAT'] == '3'\n\ndef test_two():\n    pass\n"
    assert run_tests(written(tmp_path, body), {**ENVIRONMENT, "WHAT": "3"}) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def test_it():\n    assert 1 + 1 == 3, 'arithmetic'\n", "arithmetic"),
        ("import os\n\ndef test_it():\n    os.abort()\n", "(?s)signal 6.*test_it"),
        ("", "exit code 5"),
    ],
)
def test_failures_come_through(tmp_path, body, message):
    with pytest.raises(AssertionError, match=message):
        run_tests(written(tmp_path, body), ENVIRONMENT)
