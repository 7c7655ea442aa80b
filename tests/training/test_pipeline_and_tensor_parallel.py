"""Start here when a run on tp x pp ranks differs with messages in parts, or prints no lines on overlap."""

import contextlib
import io
from pathlib import Path
from typing import Any

from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.config import TrainConfig
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.training.train import train

LAYOUT = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "schedule": "zb_h1", "overlap": 4}


def train_both(rank: int, world_size: int, *configs: TrainConfig) -> list[str]:
    printed = []
    for config in configs:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            train(config, Path(str(config.training.run_folder)))
        printed.append(said.getvalue())
    return printed


def test_messages_in_parts_and_the_lines_on_overlap(runs: Any, tmp_path: Path) -> None:
    folders = {scatters: tmp_path / f"run {scatters}" for scatters in (True, False)}
    configs = [
        runs.config(folder, **LAYOUT, scatter_messages=scatters, num_steps=2, profile_steps=int(scatters))
        for scatters, folder in folders.items()
    ]
    first, *others = run_on_ranks(train_both, 4, *configs, timeout_s=300)
    assert others == [["", ""]] * 3
    parts, whole = (RunFolder(folder).read_metrics() for folder in folders.values())
    keys = ("loss", "gradient_norm", "validation_loss")
    found = [[{key: record.get(key) for key in keys} for record in records] for records in (parts, whole)]
    assert found[0] == found[1] and found[0][0]["loss"] > 1, "the same bits"
    for printed, is_measured in zip(first, (True, False), strict=True):
        said = printed.splitlines()
        start = next(index for index, line in enumerate(said) if line.startswith("overlap"))
        head, *lines = said[start : start + 4]
        assert head.startswith("overlap of products and collectives: 4 chunks; each rank does its transfers itself")
        assert [line.split(":")[0].strip() for line in lines] == [
            "attention.query_key_value",
            "attention.projection",
            "mlp",
        ]
        assert all("in 4 chunks" in line and ("; measured " in line) == is_measured for line in lines)
