"""Start here when `train --profile` leaves no trace, or traces other steps."""

import json
import re
from pathlib import Path
from typing import Any

from fused_megatron import cli
from fused_megatron.config.config_file import save_config
from fused_megatron.training.step_recording import FIRST_STEP


def test_the_wanted_steps_are_traced_with_their_memory(runs: Any, tmp_path: Path, capsys: Any) -> None:
    config = runs.config(tmp_path / "run", num_steps=FIRST_STEP + 3, checkpoint_interval=99, replica_check_interval=0)
    save_config(config, tmp_path / "c.toml")
    named = ["--training.named-ranges", "true"]
    assert cli.main(["train", str(tmp_path / "c.toml"), "--profile", "2", *named]) == 0
    trace = tmp_path / "run" / "profile" / "rank-0.trace.json"
    assert f"recorded steps: {trace}" in capsys.readouterr().out.replace("\n", "")
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert sorted(name for name in names if re.fullmatch(r"step \d+", str(name))) == ["step 4", "step 5"]
    microbatches = {f"{kind} stage 0 microbatch {i}" for kind in ("forward", "backward") for i in range(4)}
    assert microbatches | {"fused_megatron::cross_entropy_gradient_"} <= names
    assert {"blocks.0.attention", "blocks.1.mlp"} <= names
    assert any(event.get("name") == "[memory]" for event in events)


def test_a_run_that_ends_first_leaves_what_it_has(runs: Any, tmp_path: Path) -> None:
    config = runs.config(tmp_path / "run", num_steps=FIRST_STEP + 1, checkpoint_interval=99, replica_check_interval=0)
    save_config(config, tmp_path / "c.toml")
    assert cli.main(["train", str(tmp_path / "c.toml"), "--profile=50"]) == 0
    assert (tmp_path / "run" / "profile" / "rank-0.trace.json").stat().st_size > 10_000
