"""Start here when a report on a terminal is wider than it, or loses a cell."""

import io

import pytest
from rich.console import Console

from fused_megatron.terminal_tables import print_report

REPORT = """ops, Xeon, 2026-11-30

| op | dtype | x eager |
|----|-------|---------|
| layer_norm [4096, 768], with a long description of what was measured | float32 | 2.50x [2.40-2.60] |
| gelu [8] | - | - |

1 slower, [2] faster"""


@pytest.mark.parametrize("width", [200, 60, 30])
def test_a_terminal_has_tables_of_its_width_with_every_word(width: int) -> None:
    output = io.StringIO()
    print_report(REPORT, Console(file=output, width=width, force_terminal=True, color_system=None))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= width and not any(line.startswith("|") for line in lines)
    letters = "".join(output.getvalue().split())
    assert all(word in letters for word in ("1slower,[2]faster", "2026-11-30"))
    if width == 200:
        assert "layer_norm [4096, 768], with a long description of what was measured" in output.getvalue()
        assert [line.split()[-1] for line in lines if "gelu [8]" in line] == ["-"]


def test_elsewhere_the_report_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(REPORT)
    assert capsys.readouterr().out == REPORT + "\n"
