"""Start here when a run resumes with other settings and does not report them, or loses its weights."""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fused_megatron.assembly.assemble import assemble
from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.checkpoint import (
    TensorBox,
    list_checkpoints,
    load_checkpoint,
    read_manifest,
    read_tensor,
    save_checkpoint,
)
from fused_megatron.checkpoint.model_state import optimizer_boxes, parameter_boxes
from fused_megatron.checks import InputError
from fused_megatron.config import DataConfig, GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.reference.philox import MASK_VERSION
from fused_megatron.sharding import mark_all_shards
from fused_megatron.testing import run_on_ranks
from fused_megatron.training.resume import (
    check_same_state,
    learning_rate_jump,
    other_dropout_masks,
    settings_that_differ,
)
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
    def on_cpu(**changes: Any) -> TrainConfig:
        return config_for(tmp_path, **changes).for_device("cpu")

    saved = json.loads(json.dumps(dataclasses.asdict(on_cpu())))
    assert settings_that_differ(saved, on_cpu(log_interval=3, pipeline_cut=(1,), cache_folder="x")) == []
    changes = {"num_steps": 9, "beta2": 0.5, "hidden_dropout": 0.25, "seed": 7, "dtype": "bfloat16", "decay_steps": 3}
    found = settings_that_differ(saved, on_cpu(vocab_size=270, **changes))
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
    assert settings_that_differ(saved, on_cpu()) == []


def test_a_jump_of_the_learning_rate_is_told(tmp_path: Path) -> None:
    saved = dataclasses.asdict(config_for(tmp_path, num_steps=100))
    assert learning_rate_jump(saved, config_for(tmp_path, num_steps=100), 60) is None
    longer = config_for(tmp_path, num_steps=1000)
    found = learning_rate_jump(saved, longer, 100)
    assert found == "the learning rate of step 101 is 0.000978; with the checkpoint's settings it would be 0.0001"
    own = {"decay_steps": 50}
    saved = dataclasses.asdict(config_for(tmp_path, num_steps=100, **own))
    assert learning_rate_jump(saved, config_for(tmp_path, num_steps=1000, **own), 100) is None


def test_a_checkpoint_with_masks_of_another_version_is_told(tmp_path: Path) -> None:
    plain, dropping = config_for(tmp_path).model, config_for(tmp_path, hidden_dropout=0.1).model
    assert other_dropout_masks({"dropout_mask": MASK_VERSION}, dropping) is None
    assert other_dropout_masks({}, plain) is None
    found = other_dropout_masks({}, dropping)
    assert found is not None and found.startswith("has dropout masks of version 1, and this release draws version 2: ")
    assert other_dropout_masks({"dropout_mask": 3}, dropping) is not None


def test_a_prolonged_run_says_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config_for(tmp_path), tmp_path / "run")
    assert "not as in" not in capsys.readouterr().out
    train(config_for(tmp_path, num_steps=4), tmp_path / "run")
    shown = capsys.readouterr().out
    assert "not as in the checkpoint: training.num_steps=2 there, 4 here\n" in shown
    jump = "the learning rate of step 3 is 0.00055; with the checkpoint's settings it would be 0.0001"
    assert f"warning: {jump}\n" in shown


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    sgd = config_for(tmp_path, kind="sgd")
    train(sgd, tmp_path / "run")
    assert {
        name.split(".")[1]
        for name in read_manifest(tmp_path / "run/checkpoints/step-000002").tensors
        if name.startswith("optimizer.")
    } == {"momentum_buffer"}
    with pytest.raises(InputError, match=r"optimizer.kind='sgd' there, 'adamw' here \(set optimizer.kind='sgd', or"):
        train(config_for(tmp_path, num_steps=3), tmp_path / "run")
    train(dataclasses.replace(sgd, training=dataclasses.replace(sgd.training, num_steps=3)), tmp_path / "run")
    check_same_state(tmp_path, {"optimizer": {"lr": 1.0}}, config_for(tmp_path))  # of an earlier release
    with pytest.raises(InputError, match=r"optimizer.state_dtype='float32' there, 'bfloat16' here"):
        check_same_state(tmp_path, {}, config_for(tmp_path, state_dtype="bfloat16"))


def boxes_of(config: TrainConfig) -> dict[str, TensorBox]:
    """Return this rank's boxes of weights, moments and main weights in the layout of a config."""
    mesh, plan = build_mesh(config), plan_pipeline(config)
    assembly = assemble(config, mesh, plan, build_stages(config, mesh, plan, torch.device("cpu")))
    mark_all_shards(assembly.model)
    rows = assembly.replicas.rows
    state = optimizer_boxes(assembly.parameters, assembly.optimizer.state(), rows)
    return {**parameter_boxes(assembly.parameters, assembly.own_weights, rows), **state}


def values_of(name: str, box: TensorBox) -> torch.Tensor:
    """Return the part of a full tensor of random numbers, which only the name decides."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(box.full_shape, generator=generator)[box.box.slices()].to(box.tensor.dtype)


def resharded(rank: int, world_size: int, folder: Path, step: int, *configs: TrainConfig) -> int:
    """Load the newest checkpoint in each layout and save it as the next step; return the bytes of optimizer state."""
    group = dist.group.WORLD if world_size > 1 else None
    for config in configs:
        boxes = boxes_of(config)
        if step == 0:
            for name, box in boxes.items():
                box.tensor.copy_(values_of(name, box))
        else:
            load_checkpoint(folder / f"step-{step:06d}", boxes, group=group)
        for name, box in boxes.items():
            assert torch.equal(box.tensor, values_of(name, box)), name
        step += 1
        save_checkpoint(folder, step, boxes, state={}, group=group)
    return sum(box.tensor.nbytes for name, box in boxes.items() if name.startswith("optimizer."))


def test_shared_optimizer_state_loads_at_any_other_layout_and_back(tmp_path: Path) -> None:
    """Two replicas in stage 1 of ZeRO; one process; two tensor-parallel ranks; two and three replicas in all stages."""
    # Muon: matrices have other state than AdamW's parameters.
    optimizer = {"kind": "muon", "state_dtype": "bfloat16"}
    sizes = {"vocab_size": 270, "dtype": "bfloat16", "global_batch_size": 6, "microbatch_size": 1, **optimizer}
    shared = config_for(tmp_path, **sizes)
    tensor_parallel = config_for(tmp_path, **sizes, tensor_parallel_size=2)
    whole, *stages = (config_for(tmp_path, **sizes, zero_stage=stage) for stage in (0, 2, 3))
    folder = tmp_path / "checkpoints"
    held = run_on_ranks(resharded, 2, folder, 0, shared, timeout_s=100)
    assert resharded(0, 1, folder, 1, shared) == sum(held)  # stage 1 shares the states out
    assert run_on_ranks(resharded, 2, folder, 2, tensor_parallel, *stages, shared, timeout_s=100) == held
    run_on_ranks(resharded, 3, folder, 6, whole, *stages, timeout_s=100)
    assert run_on_ranks(resharded, 2, folder, 9, stages[1], shared, timeout_s=100) == held


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
