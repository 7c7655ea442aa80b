"""Start here when a run on several texts reads other samples at another layout, or after it resumed."""

import json
from pathlib import Path
from typing import Any


def test_a_blend_has_one_curve_at_every_layout_and_goes_on_after_a_resume(runs: Any, tmp_path: Path) -> None:
    lines = [f"another text, number {i}, of {'zxy' * (i % 4)}" for i in range(300)]
    (tmp_path / "other.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    data = {"path": (str(runs.folder / "text"), str(tmp_path / "other.jsonl")), "weights": (0.4, 0.6)}
    expected = runs.trained(tmp_path / "one", **data)
    alone = runs.of_one_process({})[1]
    assert [record["loss"] for record in alone if "loss" in record] != [r["loss"] for r in expected if "loss" in r]
    run = tmp_path / "two"
    runs.assert_same(runs.trained(run, data_parallel_size=2, **data), expected)
    # Killed after step 2, and resumed by ranks that share each layer.
    runs.lose_last_checkpoint(run)
    runs.assert_same(runs.trained(run, tensor_parallel_size=2, **data), expected)
