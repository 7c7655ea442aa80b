"""Start here when a run resumes with other settings and does not report them, or loses its weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_megatron.checkpoint import list_checkpoints, read_manifest, read_tensor
from fused_megatron.config import DataConfig, GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.training.resume import learning_rate_jump, settings_that_differ
from fused_megatron.training.train import train


def config_for(folder: Path, **changes: Any) -> TrainConfig:
    """Return the config of a run of a second; `changes` are fields of any section."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("\n\n".join("the quick brown fox jumps over the lazy dog " * 9 for _ in range(40)))
    sections: dict[str, Any] = {
        "model": GPTConfig(num_layers=1, hidden_size=16, num_heads=2, seq_len=16),
        "data": DataConfig(path=str(text), cache_folder=str(folder / "cache"), tokenizer_vocab_size=270),
        "optimizer": OptimizerConfig(warmup_steps=1, lr=1e-3, min_lr=1e-4),
        "parallel": ParallelConfig(),
        "training": TrainingConfig(num_steps=2, global_batch_size=4, microbatch_size=2, eval_batches=1),
    }
    for name, section in sections.items():
        fields = {field.name for field in dataclasses.fields(section)}
        sections[name] = dataclasses.replace(section, **{k: v for k, v in changes.items() if k in fields})
    return TrainConfig(**sections)


def test_every_setting_that_changes_what_is_learnt_is_named(tmp_path: Path) -> None:
    saved = json.loads(json.dumps(dataclasses.asdict(config_for(tmp_path))))
    assert settings_that_differ(saved, config_for(tmp_path, log_interval=3, pipeline_cut=(1,), cache_folder="x")) == []
    changes = {"num_steps": 9, "beta2": 0.5, "hidden_dropout": 0.25, "seed": 7, "dtype": "bfloat16", "decay_steps": 3}
    found = settings_that_differ(saved, config_for(tmp_path, vocab_size=270, **changes))
    assert found == [
        "model.hidden_dropout=0.0 there, 0.25 here",
        "optimizer.decay_steps=not given there, 3 here",
        "optimizer.beta2=0.95 there, 0.5 here",
        "training.num_steps=2 there, 9 here",
        'training.dtype="float32" there, "bfloat16" here',
        "training.seed=1234 there, 7 here",
    ]
    # A checkpoint of an earlier release that lacked them, and one of an imported model.
    del saved["optimizer"]["decay_steps"], saved["data"]
    assert settings_that_differ(saved, config_for(tmp_path)) == []


def test_a_jump_of_the_learning_rate_is_told(tmp_path: Path) -> None:
    saved = dataclasses.asdict(config_for(tmp_path, num_steps=100))
    assert learning_rate_jump(saved, config_for(tmp_path, num_steps=100), 60) is None
    longer = config_for(tmp_path, num_steps=1000)
    found = learning_rate_jump(saved, longer, 100)
    assert found == "the learning rate of step 101 is 0.000978; with the checkpoint's settings it would be 0.0001"
    own = {"decay_steps": 50}
    saved = dataclasses.asdict(config_for(tmp_path, num_steps=100, **own))
    assert learning_rate_jump(saved, config_for(tmp_path, num_steps=1000, **own), 100) is None


def test_a_prolonged_run_says_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config_for(tmp_path), tmp_path / "run")
    assert "not as in" not in capsys.readouterr().out
    train(config_for(tmp_path, num_steps=4), tmp_path / "run")
    shown = capsys.readouterr().out
    assert "not as in the checkpoint: training.num_steps=2 there, 4 here\n" in shown
    jump = "the learning rate of step 3 is 0.00055; with the checkpoint's settings it would be 0.0001"
    assert f"warning: {jump}\n" in shown


def weights(run: Path, step: int, kind: str) -> dict[str, torch.Tensor]:
    path = run / "checkpoints" / f"step-{step:06d}"
    manifest = read_manifest(path)
    names = [name for name in manifest.tensors if name.startswith(kind)]
    return {name.removeprefix(kind): read_tensor(path, manifest, name) for name in names}


def test_from_float32_into_bfloat16_and_back(tmp_path: Path) -> None:
    """Both directions keep the float32 weights; without a step nothing changes."""
    run, still = tmp_path / "run", {"lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0}
    train(config_for(tmp_path), run)
    first = weights(run, 2, "model.")
    train(config_for(tmp_path, num_steps=3, dtype="bfloat16", **still), run)
    main, rounded = weights(run, 3, "optimizer.main."), weights(run, 3, "model.")
    assert main.keys() == first.keys() == rounded.keys()
    assert all(torch.equal(main[name], first[name]) for name in first)
    assert all(torch.equal(rounded[name], first[name].bfloat16()) for name in first)
    train(config_for(tmp_path, num_steps=4, **still), run)
    last = weights(run, 4, "model.")
    assert all(torch.equal(last[name], first[name]) for name in first)
    moments = [weights(run, step, "optimizer.exp_avg_sq.") for step in (3, 4)]
    assert all(0 < moments[1][name].sum() != moments[0][name].sum() for name in first)
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-000004", "step-000003"]
