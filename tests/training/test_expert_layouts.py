"""Start here when a model with experts trains differently in some layout, or resumes wrongly in another."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.config import DataConfig, GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.training.train import train

# Each run draws its loss plot: imported once here, matplotlib is shared by all forked ranks.
with contextlib.suppress(ImportError):
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

NUM_STEPS = 10
SEQ_LEN = 26
EXPERTS: dict[str, Any] = {"num_experts": 4, "experts_per_token": 2, "balance_loss": 0.02, "router_z_loss": 0.002}
DROPOUT: dict[str, Any] = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}
LLAMA: dict[str, Any] = {"activation": "swiglu", "normalization": "rms_norm", "position": "rotary", "num_kv_heads": 2}
FORMS: dict[str, dict[str, Any]] = {
    # Experts with biases, of which some are dropped.
    "gpt": {**EXPERTS, "capacity_factor": 1.25, "router_bias_rate": 0.01},
    "dropout": {**EXPERTS, **DROPOUT, "router_jitter": 0.1, "num_shared_experts": 1},
    "llama": {
        **EXPERTS,
        **LLAMA,
        "linear_biases": False,
        "expert_ffn_hidden_size": 48,
        "num_shared_experts": 2,
        "shared_expert_gate": True,
        "num_dense_layers": 1,
        "router_normalize": False,
    },
    # As DeepSeek-V3.
    "sigmoid": {
        **EXPERTS,
        **LLAMA,
        "linear_biases": False,
        "num_experts": 8,
        "router_scores": "sigmoid",
        "router_scale": 1.5,
        "router_groups": 4,
        "router_groups_per_token": 2,
        "router_bias_rate": 0.01,
        "balance_loss_over": "step",
    },
    "documents": {**EXPERTS, **LLAMA, "mask_documents": True, "moe_every": 2},
}
SP = {"tensor_parallel_size": 2, "sequence_parallel": True}
TP = {"tensor_parallel_size": 2}
PP = {"pipeline_parallel_size": 2}
CP = {"context_parallel_size": 2}
RANKS = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", "data_parallel_size")
EXPERT_RANKS = ("expert_parallel_size", "expert_tensor_parallel_size")


def ep(size: int, etp: int = 1) -> dict[str, Any]:
    return {"expert_parallel_size": size, "expert_tensor_parallel_size": etp}


def config_for(work: Path, run: Path, **changes: Any) -> TrainConfig:
    """Return the config of a run of seconds; `changes` are fields by name, each of the first section that has it."""
    sections: dict[str, Any] = {
        "model": GPTConfig(num_layers=2, hidden_size=32, num_heads=4, seq_len=SEQ_LEN),
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
        for key in ("loss", "gradient_norm", "balance_loss", "z_loss", "validation_loss", "bits_per_byte"):
            if theirs.get(key) is not None:
                tolerance = 1e-6 if theirs["step"] == 1 else 1e-5
                assert abs(ours[key] - theirs[key]) <= tolerance * abs(theirs[key]), (key, ours, theirs)
        for key in ("validation_tokens", "expert_load_max_over_mean_by_block", "dropped"):
            assert ours.get(key) == theirs.get(key), (ours, theirs)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a text of short documents."""
    work = tmp_path_factory.mktemp("experts")
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
    ("gpt", {**ep(2), "data_parallel_size": 2}, True),
    ("dropout", {**ep(2), **SP}, False),
    ("llama", {**ep(2), **TP}, False),
    ("llama", {**ep(2), **CP}, False),
    ("gpt", {**ep(2), **CP}, False),
    ("gpt", {**ep(1, 2), **TP}, False),
    ("dropout", {**ep(2), **PP, "data_parallel_size": 2}, False),
    ("sigmoid", {**ep(2, 2), **SP, **CP}, False),
    ("documents", {**ep(4), **TP, **CP}, False),
]


def name_of(form: str, layout: dict[str, Any]) -> str:
    words = [str(value) for key, value in layout.items() if key not in RANKS + EXPERT_RANKS]
    sizes = [f"{key[0]}p{layout[key]}" for key in RANKS if key in layout]
    sizes += [f"{name}{layout[key]}" for name, key in zip(("ep", "etp"), EXPERT_RANKS, strict=True) if key in layout]
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
