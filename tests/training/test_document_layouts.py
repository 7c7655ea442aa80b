"""Start here when a GPT on masked documents trains differently at some layout, or does not resume."""

import contextlib
import json
from pathlib import Path
from typing import Any

from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.config import DataConfig, GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.data.training_data import open_training_data
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.training.train import train

# Each run draws its loss plot: imported once here, matplotlib is shared by all forked ranks.
with contextlib.suppress(ImportError):
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

NUM_STEPS, SEQ_LEN, WINDOW = 4, 24, 9


def config_of(folder: Path, run: str, model: dict[str, Any], parallel: dict[str, Any], microbatch: int) -> TrainConfig:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "seq_len": SEQ_LEN}
    form = {"position": "rotary", "sliding_window": WINDOW, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    return TrainConfig(
        GPTConfig(**{**sizes, **form, **model}),
        ParallelConfig(timeout_s=120, **parallel),
        DataConfig(
            path=str(folder / "pages.jsonl"),
            cache_folder=str(folder / "cache"),
            tokenizer_vocab_size=300,
            mask_documents=True,
        ),
        OptimizerConfig(lr=3e-3, min_lr=1e-3, warmup_steps=2),
        TrainingConfig(
            num_steps=NUM_STEPS,
            global_batch_size=8,
            microbatch_size=microbatch,
            eval_interval=NUM_STEPS,
            eval_batches=1,
            checkpoint_interval=2,
            run_folder=str(folder / run),
        ),
    )


def run_training(rank: int, world_size: int, config: TrainConfig) -> None:
    train(config, Path(str(config.training.run_folder)))


def trained(folder: Path, run: str, ranks: int, microbatch: int, **changes: Any) -> list[dict[str, Any]]:
    model = {key: changes.pop(key) for key in ("recompute",) if key in changes}
    run_on_ranks(run_training, ranks, config_of(folder, run, model, changes, microbatch), timeout_s=300)
    return RunFolder(folder / run).read_metrics()


def assert_same_curve(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key in {"loss", "gradient_norm", "validation_loss", "bits_per_byte"} & theirs.keys():
            assert abs(ours[key] - theirs[key]) <= 1e-5 * abs(theirs[key]), (key, ours, theirs)
        for key in {"targets", "visible_pairs", "validation_tokens"} & theirs.keys():
            assert ours[key] == theirs[key], (key, ours, theirs)


def test_one_curve_at_every_layout_and_over_a_resume(tmp_path: Path) -> None:
    # Documents of very different lengths, so that samples, and ranks, have different numbers of targets.
    pages = [" ".join(f"{i * j % 13} of {i}" for j in range(i * i % 23)) or "x" for i in range(150)]
    (tmp_path / "pages.jsonl").write_text("\n".join(json.dumps({"text": page}) for page in pages))
    one = trained(tmp_path, "one", 1, microbatch=8)
    run = tmp_path / "several"
    layout = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "sequence_parallel": True}
    assert_same_curve(trained(tmp_path, run.name, 4, microbatch=2, recompute="full", **layout), one)
    (run / "checkpoints" / f"step-{NUM_STEPS:06d}").rename(tmp_path / "lost")
    assert_same_curve(trained(tmp_path, run.name, 2, microbatch=2, recompute="selective"), one)  # two replicas

    # What is counted, from the tokens of the step.
    data = open_training_data(config_of(tmp_path, "one", {}, {}, 8), lambda *_: None)
    assert data.tokenizer is not None
    steps = [record for record in one if "loss" in record]
    for step, record in enumerate(steps):
        targets = pairs = 0
        for inputs in data.training_batch(8 * step, 8, 0, 1).inputs.tolist():
            position = 0
            for token in inputs:
                pairs += min(position + 1, WINDOW)
                ends = token == data.tokenizer.end_of_document
                targets += not ends
                position = 0 if ends else position + 1
        assert (record["targets"], record["visible_pairs"]) == (targets, pairs)
    assert len({record["targets"] for record in steps}) > 1
