"""Start here when the planner's figures in docs/claims.md are no longer what it computes."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    spec = importlib.util.spec_from_file_location("claims", ROOT / "benchmarks/claims.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["claims"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


MOST_STALE = 0.25
"""Share by which figures of today may differ from the stored ones, which are of a release."""
AGAIN = "python benchmarks/claims.py --write"


def stored() -> dict[str, dict[str, Any]]:
    return json.loads((ROOT / "docs/results/claims.json").read_text())


def numbers(figures: Any) -> list[float]:
    """Return all numbers of nested figures, in their order."""
    if isinstance(figures, dict):
        return [number for value in figures.values() for number in numbers(value)]
    return [figures]


def check_same(claim: Any, row: dict[str, Any]) -> None:
    assert (claim.text, claim.verdict) == (row["claim"], row["verdict"]), AGAIN
    today, then = numbers(claim.figures), numbers(row["figures"])
    assert today == pytest.approx(then, rel=MOST_STALE, abs=0), AGAIN


def test_the_page_has_the_stored_results_and_they_are_nearly_of_today(claims: ModuleType) -> None:
    rows = stored()
    assert claims.table(rows) in (ROOT / "docs/claims.md").read_text(), AGAIN
    assert rows.keys() == claims.CLAIMS.keys()
    for name, make in claims.CLAIMS.items():
        if name != "automatic":
            check_same(make(), rows[name])


def test_verdicts_follow_from_the_figures(claims: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert claims.training_days().verdict == claims.HOLDS
    faster = claims.replace(claims.CLUSTER, peak_tflops=4 * claims.CLUSTER.peak_tflops)
    monkeypatch.setattr(claims, "CLUSTER", faster)
    assert claims.training_days().verdict == claims.FAILS


def test_the_search_of_small_rows(claims: ModuleType) -> None:
    small = claims.automatic(most_gpus=32).figures["speed_of_the_plan_over_hand_made"]
    all_rows = stored()["automatic"]["figures"]["speed_of_the_plan_over_hand_made"]
    assert len(small) == 1 and len(all_rows) == 8
    assert all(value == pytest.approx(all_rows[name], rel=MOST_STALE) for name, value in small.items())


@pytest.mark.slow
def test_the_search_of_all_rows(claims: ModuleType) -> None:
    check_same(claims.automatic(), stored()["automatic"])
