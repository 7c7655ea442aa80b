"""Start here when verify's small config has another structure than the config: model forms, axes, stages, heads."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fused_megatron.assembly.build import stage_spans
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.planning.verify.reduced_config import MOST_RANKS, axes_in_use, reduce_config

ROOT = Path(__file__).parents[3]
FILES = sorted([*(ROOT / "benchmarks" / "presets").glob("*.toml"), *(ROOT / "examples").glob("*.toml")])
KEPT = (
    "family",
    "activation",
    "normalization",
    "position",
    "tied_embeddings",
    "linear_biases",
    "qkv_bias",
    "query_key_norm",
    "hidden_dropout",
    "attention_dropout",
    "embedding_dropout",
    "recompute",
)


def reduced(config: TrainConfig) -> TrainConfig:
    found = reduce_config(config, axes_in_use(config))
    assert found.parallel.num_ranks <= MOST_RANKS and found.model.hidden_size <= 128 and found.model.seq_len <= 20
    plan = plan_pipeline(found)
    stage_spans(found, plan)
    found.check_data_parallel(found.parallel.data_parallel_size or 1)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_of_ours_keeps_its_structure(path: Path) -> None:
    config = load_config(path)
    small = reduced(config)
    for name in KEPT:
        assert getattr(small.model, name) == getattr(config.model, name), name
    full_plan, plan = plan_pipeline(config), plan_pipeline(small)
    assert plan.name == full_plan.name and bool(plan.tied) == bool(full_plan.tied)
    assert (small.parallel.stages_per_rank or 1) == (config.parallel.stages_per_rank or 1)
    assert small.parallel.sequence_parallel == config.parallel.sequence_parallel
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        assert (getattr(small.parallel, name) > 1) == (getattr(config.parallel, name) > 1)
    assert small.optimizer.weight_decay == config.optimizer.weight_decay
    per_replica = small.training.global_batch_size // (small.parallel.data_parallel_size or 1)
    assert per_replica >= 2 * small.training.microbatch_size


def config_of(parallel: dict[str, Any], training: dict[str, Any] | None = None, **model: Any) -> TrainConfig:
    fields = {"num_layers": 8, "hidden_size": 512, "num_heads": 16, "seq_len": 64, "vocab_size": 1000, **model}
    return TrainConfig(
        GPTConfig(**fields),
        ParallelConfig(**parallel),
        training=TrainingConfig(**{"global_batch_size": 96, "microbatch_size": 2, **(training or {})}),
    )


@pytest.mark.parametrize(
    ("parallel", "axes", "sizes"),
    [
        ({"tensor_parallel_size": 8, "data_parallel_size": 1}, ("tp",), (2, 1, 1)),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, ("tp", "pp", "dp"), (2, 2, 2)),
        ({"pipeline_parallel_size": 8, "data_parallel_size": 2}, ("pp", "dp"), (1, 3, 2)),
        ({"pipeline_parallel_size": 8, "data_parallel_size": 1}, ("pp",), (1, 3, 1)),
        ({"data_parallel_size": 16}, ("dp",), (1, 1, 2)),
        ({"stages_per_rank": 3, "data_parallel_size": 1}, ("pp",), (1, 1, 1)),
    ],
    ids=str,
)
def test_axes_and_their_sizes(parallel: dict[str, Any], axes: tuple[str, ...], sizes: tuple[int, int, int]) -> None:
    config = config_of(parallel)
    assert axes_in_use(config) == axes
    small = reduced(config).parallel
    assert (small.tensor_parallel_size, small.pipeline_parallel_size, small.data_parallel_size) == sizes


def test_an_open_number_of_replicas_is_an_axis_where_the_batch_divides() -> None:
    assert axes_in_use(config_of({}, {"global_batch_size": 4, "microbatch_size": 2})) == ("dp",)
    assert axes_in_use(config_of({}, {"global_batch_size": 6, "microbatch_size": 2})) == ()


@pytest.mark.parametrize(
    ("tp", "heads", "kv_heads", "wanted"),
    [
        (8, 16, None, (2, 4, None)),  # several heads a rank
        (8, 8, None, (2, 2, None)),
        (8, 16, 1, (2, 4, 1)),  # every rank holds the one key-value head
        (8, 16, 2, (4, 8, 2)),  # some ranks hold the same key-value head
        (2, 16, 4, (2, 16, 4)),
        (4, 16, 4, (2, 8, 2)),
        (1, 16, 4, (1, 8, 2)),
    ],
    ids=str,
)
def test_heads(tp: int, heads: int, kv_heads: int | None, wanted: tuple[int, int, int | None]) -> None:
    parallel = {"tensor_parallel_size": tp, "data_parallel_size": 1}
    small = reduced(config_of(parallel, num_heads=heads, num_kv_heads=kv_heads))
    found = small.parallel.tensor_parallel_size, small.model.num_heads, small.model.num_kv_heads
    assert found == wanted


@pytest.mark.parametrize(("vocab_size", "even"), [(1024, True), (1000, False), (None, False)])
def test_the_vocabulary_is_padded_where_the_full_one_is(vocab_size: int | None, even: bool) -> None:
    model = reduced(config_of({"tensor_parallel_size": 2}, vocab_size=vocab_size)).model
    assert model.vocab_size is not None
    assert (model.vocab_size % model.pad_vocab_size_to_multiple_of == 0) == even


def test_stages_of_different_sizes_stay_so() -> None:
    even = reduced(config_of({"pipeline_parallel_size": 2, "data_parallel_size": 1}))
    uneven = reduced(config_of({"pipeline_parallel_size": 2, "data_parallel_size": 1}, num_layers=7))
    assert (even.model.num_layers, uneven.model.num_layers) == (2, 3)
    cut = config_of({"pipeline_parallel_size": 2, "stages_per_rank": 2, "pipeline_cut": (4, 1, 3, 0)})
    assert reduced(cut).parallel.pipeline_cut == (2, 1, 2, 0)
    longer = config_of({"pipeline_parallel_size": 4, "data_parallel_size": 2, "pipeline_cut": (3, 1, 3, 1)})
    assert reduced(longer).parallel.pipeline_cut == (2, 1, 1)


def test_forms_of_the_model_are_scaled() -> None:
    parallel = {"tensor_parallel_size": 2}
    forms = {
        "head_dim": 64,
        "ffn_hidden_size": 1376,
        "position": "rotary",
        "rotary_fraction": 0.25,
        "sliding_window": 16,
        "rotary_scaling": "llama3",
        "rotary_original_seq_len": 32,
    }
    small = reduced(config_of(parallel, **forms)).model
    assert small.head_dim == 16 and small.hidden_size == 32 and small.ffn_hidden_size == 86
    assert (small.sliding_window, small.rotary_original_seq_len) == (5, 10)


def test_what_would_hide_a_fault_is_changed() -> None:
    small = reduced(config_of({"tensor_parallel_size": 2}))
    assert small.parallel.overlap == 3 and small.optimizer.clip_norm < 1
    unclipped = TrainConfig(optimizer=OptimizerConfig(lr=1e-5, min_lr=0.0, clip_norm=0.0))
    small = reduced(unclipped)
    assert small.optimizer.clip_norm == 0.0 and small.optimizer.lr == 1e-3
    assert reduce_config(unclipped, (), "bfloat16").training.dtype == "bfloat16"
    assert asdict(small.data) == asdict(unclipped.data)
    kinds = {
        kind: reduced(TrainConfig(optimizer=OptimizerConfig(kind=kind))).optimizer for kind in ("sgd", "lion", "muon")
    }
    assert {kind: optimizer.kind for kind, optimizer in kinds.items()} == {
        "sgd": "sgd",
        "lion": "adamw",
        "muon": "muon",
    }


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(InputError, match="must be divisible by microbatch_size=2 x data_parallel_size=5"):
        reduced(config_of({"data_parallel_size": 5}))
    with pytest.raises(InputError, match="changes the update rule"):
        reduced(config_of({"pipeline_parallel_size": 2, "schedule": "pipedream"}))
