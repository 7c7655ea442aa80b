"""Runs of seconds on a text of short documents, for the tests that compare layouts with one process."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.config import (
    BERTConfig,
    DataConfig,
    GPTConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
)
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.training.train import train

# Each run draws its loss plot: imported once here, matplotlib is shared by all forked ranks.
with contextlib.suppress(ImportError):
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

RANKS = {
    "tensor_parallel_size": "tp",
    "pipeline_parallel_size": "pp",
    "context_parallel_size": "cp",
    "data_parallel_size": "dp",
    "expert_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
}
COMPARED = ("loss", "gradient_norm", "balance_loss", "z_loss", "validation_loss", "bits_per_byte")


def run_training(rank: int, world_size: int, config: TrainConfig) -> None:
    train(config, Path(str(config.training.run_folder)))


class Runs:
    """Runs of a tiny model for num_steps steps on the same text.

    Attributes:
        num_steps: steps of a run; seq_len: S of the model.
    """

    num_steps = 4
    seq_len = 26  # on 4 ranks 8, 6, 6 and 6 positions with two tensor-parallel ranks, and 7, 7, 6 and 6 without

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "text").mkdir()
        pages = [
            " ".join(f"line {i * j % 17} of {i} says {'ab' * (i % 5)}." for j in range(1 + i % 4)) for i in range(300)
        ]
        text = "\n".join(json.dumps({"text": page}) for page in pages)
        (folder / "text" / "pages.jsonl").write_text(text, encoding="utf-8")
        self._curves: dict[str, tuple[Path, list[dict[str, Any]]]] = {}

    def config(self, run: Path, **changes: Any) -> TrainConfig:
        """Return a config; `changes` are fields by name, each of the first section that has it."""
        kind = BERTConfig if changes.get("family") == "bert" else GPTConfig
        cache = str(self.folder / "cache")
        sections: dict[str, Any] = {
            "model": kind(num_layers=2, hidden_size=32, num_heads=4, seq_len=self.seq_len),
            "parallel": ParallelConfig(timeout_s=120),
            "data": DataConfig(path=str(self.folder / "text"), cache_folder=cache, tokenizer_vocab_size=300),
            "optimizer": OptimizerConfig(lr=3e-3, min_lr=1e-4, warmup_steps=2),
            "training": TrainingConfig(
                num_steps=self.num_steps,
                global_batch_size=4,
                microbatch_size=1,
                eval_interval=2,
                eval_batches=1,
                checkpoint_interval=2,
                keep_checkpoints=10,
                replica_check_interval=2,
                run_folder=str(run),
            ),
        }
        for name, section in sections.items():
            fields = {field.name for field in dataclasses.fields(section)}
            taken = {key: changes.pop(key) for key in fields & changes.keys()}
            sections[name] = dataclasses.replace(section, **taken)
        assert not changes
        return TrainConfig(**sections)

    def trained(self, run: Path, **changes: Any) -> list[dict[str, Any]]:
        """Train on the ranks of the layout; return the metrics."""
        config = self.config(run, **changes)
        run_on_ranks(run_training, config.parallel.num_ranks, config, timeout_s=300)
        return RunFolder(run).read_metrics()

    def of_one_process(self, form: dict[str, Any]) -> tuple[Path, list[dict[str, Any]]]:
        """Return the folder and the metrics of one process for a form of the model; each form is trained once."""
        key = repr(form)
        if key not in self._curves:
            run = self.folder / f"one {len(self._curves)}"
            self._curves[key] = run, self.trained(run, **form)
        return self._curves[key]

    def lose_last_checkpoint(self, run: Path) -> None:
        """Leave a run as if it had been killed before its last checkpoint."""
        (run / "checkpoints" / f"step-{self.num_steps:06d}").rename(run / "lost")

    def assert_same(self, found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
        """Compare the metrics of two runs: within 1e-5, and 1e-6 in the first step."""
        assert [record["step"] for record in found] == [record["step"] for record in expected]
        for ours, theirs in zip(found, expected, strict=True):
            for key in COMPARED:
                if theirs.get(key) is not None:
                    tolerance = 1e-6 if theirs["step"] == 1 else 1e-5
                    assert abs(ours[key] - theirs[key]) <= tolerance * abs(theirs[key]), (key, ours, theirs)
            for key in ("validation_tokens", "expert_load_max_over_mean_by_block", "dropped"):
                assert ours.get(key) == theirs.get(key), (ours, theirs)


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    """A run sets torch's precision of float32 products; the next test has the old one again."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def pytest_make_parametrize_id(config: pytest.Config, val: Any, argname: str) -> str | None:
    """Name a layout by its sizes and its other settings."""
    if argname not in ("layout", "before", "after") or not isinstance(val, dict):
        return None
    sizes = [f"{short}{val[name]}" for name, short in RANKS.items() if val.get(name, 1) > 1]
    return "-".join([*sizes, *(str(value) for key, value in val.items() if key not in RANKS)]) or "one"
