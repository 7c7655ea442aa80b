"""Start here when a model trains differently on context-parallel ranks, or resumes wrongly on others."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

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

NUM_STEPS = 10
SEQ_LEN = 26  # on 4 ranks 8, 6, 6 and 6 positions with two tensor-parallel ranks, and 7, 7, 6 and 6 without
DROPOUT: dict[str, Any] = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}
LLAMA: dict[str, Any] = {"activation": "swiglu", "normalization": "rms_norm", "position": "rotary", "num_kv_heads": 2}
DOCUMENTS = {"mask_documents": True}
FORMS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "dropout": {**DROPOUT, **DOCUMENTS},
    "llama": {**LLAMA, **DROPOUT, **DOCUMENTS},
    "window": {**LLAMA, **DOCUMENTS, "sliding_window": 9, "reset_positions": False},
    "untied": {"tied_embeddings": False},
    "bert": {"family": "bert", **DROPOUT},
}
SP = {"tensor_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_parallel_size": 2}
RANKS = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", "data_parallel_size")


def cp(size: int, method: str = "ring") -> dict[str, Any]:
    return {"context_parallel_size": size, "context_parallel_method": method}


def config_for(work: Path, run: Path, **changes: Any) -> TrainConfig:
    """Return the config of a run of seconds; `changes` are fields by name, each of the first section that has it."""
    kind = BERTConfig if changes.get("family") == "bert" else GPTConfig
    sections: dict[str, Any] = {
        "model": kind(num_layers=2, hidden_size=32, num_heads=4, seq_len=SEQ_LEN),
        "parallel": ParallelConfig(timeout_s=120),
        "data": DataConfig(path=str(work / "text"), cache_folder=str(work / "cache"), tokenizer_vocab_size=300),
        "optimizer": OptimizerConfig(lr=3e-3, min_lr=1e-4, warmup_steps=3),
        "training": TrainingConfig(
            num_steps=NUM_STEPS,
            global_batch_size=4,
            microbatch_size=1,
            eval_interval=5,
            eval_batches=1,
            checkpoint_interval=5,
            keep_checkpoints=10,
            replica_check_interval=5,
            run_folder=str(run),
        ),
    }
    for name, section in sections.items():
        fields = {field.name for field in dataclasses.fields(section)}
        taken = {key: changes.pop(key) for key in fields & changes.keys()}
        sections[name] = dataclasses.replace(section, **taken)
    assert not changes
    return TrainConfig(**sections)


def run_training(rank: int, world_size: int, config: TrainConfig) -> None:
    train(config, Path(str(config.training.run_folder)))


def trained(work: Path, run: Path, **changes: Any) -> list[dict[str, Any]]:
    """Train on the ranks of the layout; return the metrics."""
    config = config_for(work, run, **changes)
    run_on_ranks(run_training, config.parallel.num_ranks, config, timeout_s=300)
    return RunFolder(run).read_metrics()


def assert_same_curve(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("loss", "gradient_norm", "validation_loss", "bits_per_byte"):
            if theirs.get(key) is not None:
                assert abs(ours[key] - theirs[key]) <= 1e-5 * abs(theirs[key]), (ours, theirs)
        assert ours.get("validation_tokens") == theirs.get("validation_tokens")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a text of short documents."""
    work = tmp_path_factory.mktemp("context")
    (work / "text").mkdir()
    pages = [" ".join(f"line {i * j % 17} of {i} says {'ab' * (i % 5)}." for j in range(1 + i % 4)) for i in range(300)]
    text = "\n".join(json.dumps({"text": page}) for page in pages)
    (work / "text" / "pages.jsonl").write_text(text, encoding="utf-8")
    return work


@pytest.fixture(scope="module")
def one_process(work: Path) -> Any:
    """Return a function that gives the curve of one process for a form of the model; each is trained once."""
    curves: dict[str, list[dict[str, Any]]] = {}

    def curve(form: str) -> list[dict[str, Any]]:
        if form not in curves:
            curves[form] = trained(work, work / f"one {form}", **FORMS[form])
        return curves[form]

    return curve


# Form of the model, layout, and whether a fast test has it.
LAYOUTS: list[tuple[str, dict[str, Any], bool]] = [
    ("dropout", {**cp(2), **SP, "recompute": "full"}, True),
    ("llama", {**cp(2, "all_gather"), "data_parallel_size": 2, "zero_stage": 3, "recompute": "selective"}, True),
    ("bert", cp(2), True),
    ("gpt", cp(2), False),
    ("gpt", cp(4), False),
    ("gpt", {**cp(2), **PP}, False),
    ("gpt", {**cp(2), **SP, **PP}, False),
    ("gpt", {**cp(2), "tensor_parallel_size": 2, "data_parallel_size": 2, "zero_stage": 0}, False),
    ("dropout", {**cp(4), **SP}, False),
    ("dropout", {**cp(4), **PP, "stages_per_rank": 1, "recompute": "selective"}, False),
    ("dropout", {**cp(4), "data_parallel_size": 2, "zero_stage": 2}, False),
    ("dropout", {**cp(2), **PP, "data_parallel_size": 2, "schedule": "zb_h1"}, False),
    ("dropout", {**cp(2, "all_to_all"), **SP, **PP}, False),
    ("llama", {**cp(4), "data_parallel_size": 2, "zero_stage": 3, "zero_shard_size": 2}, False),
    ("llama", {**cp(4, "all_to_all")}, False),
    ("llama", {**cp(4, "all_to_all+ring"), "tensor_parallel_size": 2}, False),
    ("window", cp(4), False),
    ("window", {**cp(2, "all_gather"), **SP}, False),
    ("untied", {**cp(2), **PP, "zero_stage": 3, "zero_gather": "step"}, False),
    ("bert", {**cp(2, "all_gather"), **SP, **PP}, False),
    ("bert", {**cp(4, "all_to_all"), "data_parallel_size": 2, "zero_stage": 3}, False),
]


def name_of(form: str, layout: dict[str, Any]) -> str:
    words = [str(value) for key, value in layout.items() if key not in RANKS]
    sizes = [f"{key[0]}p{layout[key]}".replace("pp", "pp") for key in RANKS if key in layout]
    return "-".join([form, *sizes, *words])


@pytest.mark.parametrize(
    ("form", "layout"),
    [
        pytest.param(form, layout, id=name_of(form, layout), marks=() if fast else pytest.mark.slow)
        for form, layout, fast in LAYOUTS
    ],
)
def test_every_layout_has_the_curve_of_one_process(
    work: Path, tmp_path: Path, one_process: Any, form: str, layout: dict[str, Any]
) -> None:
    layout = {"data_parallel_size": 1, **layout}
    assert_same_curve(trained(work, tmp_path, **FORMS[form], **layout), one_process(form))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({}, {**cp(2), "zero_stage": 3}, id="1-to-2"),
        pytest.param({**cp(4)}, {}, id="4-to-1", marks=pytest.mark.slow),
        pytest.param({**cp(2), **SP}, {**cp(4, "all_gather"), **PP}, id="2-to-4", marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_on_another_number_of_context_parallel_ranks(
    work: Path, tmp_path: Path, one_process: Any, before: dict[str, Any], after: dict[str, Any]
) -> None:
    expected = one_process("dropout")
    if before:
        trained(work, tmp_path, **FORMS["dropout"], data_parallel_size=1, **before)
    else:
        import shutil  # noqa: PLC0415

        shutil.copytree(work / "one dropout", tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / f"step-{NUM_STEPS:06d}").rename(tmp_path / "lost")
    assert_same_curve(trained(work, tmp_path, **FORMS["dropout"], data_parallel_size=1, **after), expected)
