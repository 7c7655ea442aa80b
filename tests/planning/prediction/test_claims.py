"""Start here when the planner's figures in docs/claims.md are no longer what it computes."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

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


def stored() -> dict[str, dict[str, object]]:
    return json.loads((ROOT / "docs/results/claims.json").read_text())


def test_the_page_and_the_results_are_of_today(claims: ModuleType) -> None:
    page = (ROOT / "docs/claims.md").read_text()
    quick = {name: make() for name, make in claims.CLAIMS.items() if name != "automatic"}
    assert len(quick) == 4 and {*quick, "automatic"} == {*stored()}
    for name, claim in quick.items():
        assert json.loads(json.dumps(claim.figures)) == stored()[name]["figures"], "python benchmarks/claims.py --write"
        assert f"| {claim.text} | **{claim.verdict}** | {claim.why} |" in page, "python benchmarks/claims.py --write"


def test_verdicts_follow_from_the_figures(claims: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert claims.training_days().verdict == claims.HOLDS
    faster = claims.replace(claims.CLUSTER, peak_tflops=4 * claims.CLUSTER.peak_tflops)
    monkeypatch.setattr(claims, "CLUSTER", faster)
    assert claims.training_days().verdict == claims.FAILS


def test_the_search_of_small_rows(claims: ModuleType) -> None:
    small = claims.automatic(most_gpus=32).figures["speed_of_the_plan_over_hand_made"]
    all_rows = stored()["automatic"]["figures"]["speed_of_the_plan_over_hand_made"]  # type: ignore[index]
    assert len(small) == 1 and small.items() <= all_rows.items() and len(all_rows) == 8


@pytest.mark.slow
def test_the_search_of_all_rows(claims: ModuleType) -> None:
    found = claims.automatic()
    assert found.figures == stored()["automatic"]["figures"]
    assert f"**{found.verdict}** | {found.why} |" in (ROOT / "docs/claims.md").read_text()
