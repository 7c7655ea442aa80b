"""The mended interpreter, tested where it runs: in a process of its own."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

from fused_megatron.testing.triton_interpreter import interpreter, run_tests_interpreted


def test_in_the_interpreter() -> None:
    run_tests_interpreted(Path(__file__).with_name("interpreted_triton_interpreter.py"))


def test_a_failure_inside_is_a_failure_outside(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text("def test_it():\n    assert 1 + 1 == 3, 'arithmetic'\n")
    with pytest.raises(AssertionError, match="arithmetic"):
        run_tests_interpreted(tmp_path / "failing.py")


def test_elsewhere_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(AssertionError, match="before triton is imported"), interpreter():
        pass
