"""Start here when a picture of docs/experiments.md shows other all-reduces, ranks or groups than a run has."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("parallelism_pictures")
    sys.modules.pop("parallelism_pictures", None)


@pytest.mark.slow
def test_the_pictures_are_of_recorded_transfers_and_groups(pictures: ModuleType, tmp_path: Path) -> None:
    ledger = pictures.run_on_ranks(pictures.record_block, 2)[0]
    assert pictures.all_reduces_of_a_block(ledger) == {False: 2, True: 2}
    groups = pictures.groups_of_ranks()
    assert (groups["tp"][0], groups["pp"][0], groups["dp"][0]) == ((0, 1), (0, 4, 8, 12), (0, 2))
    for of_axis in groups.values():
        assert sorted(rank for group in of_axis for rank in group) == list(range(16))
    pictures.draw_block(ledger, tmp_path / "tensor_parallel_block.svg")
    pictures.draw_cube(tmp_path / "rank_cube.svg")
    pictures.draw_groups(groups, tmp_path / "rank_groups.svg")
    for path in tmp_path.glob("*.svg"):
        assert "#7d7d7d" in path.read_text(encoding="utf-8"), path.name
    assert len(list(tmp_path.glob("*.svg"))) == 3
