"""Start here when Triton's interpreter rounds bfloat16 wrongly, or allows accesses outside of tensors."""

import os
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fused_megatron.audit.triton_interpreter import interpreter
from fused_megatron.benchmarking.pytest_process import run_tests


def test_in_the_interpreter() -> None:
    run_tests([Path(__file__).with_name("interpreted_triton_interpreter.py")], {**os.environ, "TRITON_INTERPRET": "1"})


def test_elsewhere_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(AssertionError, match="before triton is imported"), interpreter():
        pass
