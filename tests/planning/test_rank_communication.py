"""Start here when a stage of a model form that no preset has sends other bytes than planning.rank_communication."""

import dataclasses
from typing import Any

import pytest

from fused_megatron.assembly.build import stage_spans
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.dry_run import DryRun
from fused_megatron.planning.rank_communication import attention_communication, message_bytes, stage_communication

FORMS: list[dict[str, Any]] = [
    {"num_kv_heads": 1},
    {"num_kv_heads": 2, "qkv_bias": False, "query_key_norm": True, "recompute": "full"},
    {"linear_biases": False, "normalization": "rms_norm", "position": "rotary", "tied_embeddings": False},
    {"recompute": "full", "recompute_blocks": 1},
]


# In the fast part sequence parallelism takes turns.
@pytest.mark.parametrize(
    ("sequence_parallel", "form"),
    [
        pytest.param(flag, form, marks=() if flag == bool(index % 2) else pytest.mark.slow, id=f"{flag}-{name}")
        for flag in (False, True)
        for index, (name, form) in enumerate(
            zip(("one_kv_head", "query_key_norm", "llama", "recompute_blocks"), FORMS, strict=True)
        )
    ],
)
def test_forms(form: dict[str, Any], sequence_parallel: bool) -> None:
    model = GPTConfig(num_layers=4, hidden_size=32, num_heads=4, seq_len=16, vocab_size=101, **form)
    for tp in (2, 4) if sequence_parallel else (1, 2, 4):
        parallel = ParallelConfig(
            tensor_parallel_size=tp,
            pipeline_parallel_size=2,
            data_parallel_size=1,
            sequence_parallel=sequence_parallel,
        )
        config = TrainConfig(model, parallel, training=TrainingConfig(global_batch_size=4, microbatch_size=2))
        spans, dry_run = stage_spans(config, plan_pipeline(config)), DryRun(config)
        for rank in (0, tp):
            for index, sent in dry_run.rank(rank).sent.items():
                assert sent == stage_communication(config, spans[index]), (tp, index)
        assert message_bytes(config) == 4 * 16 * 2 * 32 // tp


WINDOW: dict[str, Any] = {"num_kv_heads": 2, "recompute": "selective", "sliding_window": 5}


@pytest.mark.parametrize(
    ("method", "form"),
    [
        ("all_to_all+ring", {}),
        *(
            pytest.param(method, form, marks=pytest.mark.slow)
            for method in ("ring", "all_gather", "all_to_all", "all_to_all+ring")
            for form in ({}, WINDOW)
            if (method, form) != ("all_to_all+ring", {})
        ),
    ],
    ids=str,
)
def test_context_parallel_ranks(method: str, form: dict[str, Any]) -> None:
    """Uneven parts of the sequence, also under sequence parallelism."""
    model = GPTConfig(num_layers=1, hidden_size=32, num_heads=8, seq_len=18, vocab_size=101, **form)
    parallel = ParallelConfig(
        tensor_parallel_size=2,
        data_parallel_size=1,
        context_parallel_size=4,
        context_parallel_method=method,
        sequence_parallel=True,
        zero_stage=0,
    )
    config = TrainConfig(model, parallel, training=TrainingConfig(global_batch_size=4, microbatch_size=2))
    (span,), dry_run = stage_spans(config, plan_pipeline(config)), DryRun(config)
    assert dry_run.rank(0).sent[0] == stage_communication(config, span)  # rank 0 has most positions
    for cp_rank in (0, 2):
        sent = dry_run.rank(2 * cp_rank).sent_to_context[0]
        assert sent == attention_communication(config, span, cp_rank)
    assert message_bytes(config) == 4 * 6 // 2 * 2 * 32
    assert attention_communication(dataclasses.replace(config, parallel=ParallelConfig()), span) == {}


@pytest.mark.parametrize(
    ("scatters", "seq_len", "context"),
    [(True, 15, 1), (False, 15, 1), pytest.param(True, 30, 2, marks=pytest.mark.slow)],
)
def test_messages_of_a_pipeline(scatters: bool, seq_len: int, context: int) -> None:
    """Ranks send parts of 15 positions, which sequence parallelism over 4 ranks could not divide."""
    model = GPTConfig(num_layers=4, hidden_size=12, num_heads=4, seq_len=seq_len, vocab_size=101)
    parallel = ParallelConfig(
        tensor_parallel_size=4,
        pipeline_parallel_size=2,
        data_parallel_size=1,
        context_parallel_size=context,
        schedule="zb_v",
        scatter_messages=scatters,
    )
    config = TrainConfig(model, parallel, training=TrainingConfig(global_batch_size=4, microbatch_size=1))
    spans, dry_run = stage_spans(config, plan_pipeline(config)), DryRun(config)
    assert message_bytes(config) == (4 * 45 if scatters else 4 * 180)
    for number in (0, 4 * context + 3):  # the first and the last tensor-parallel rank, of two stages each
        rank = dry_run.rank(number)
        for index, sent in rank.sent.items():
            assert sent == stage_communication(config, spans[index]), index
        # Four stages: two messages a microbatch in both directions, and two that stay on a rank.
        assert rank.transfers["send", "pp"] == (8, 8 * message_bytes(config))


@pytest.mark.parametrize("ranks", [3, 6])
def test_an_even_count_of_a_ring_is_near_the_exact_one(ranks: int) -> None:
    """A prediction takes it, since the exact count of an uneven division needs torch."""
    model = GPTConfig(num_layers=2, hidden_size=32, num_heads=8, seq_len=1000, vocab_size=101)
    parallel = ParallelConfig(data_parallel_size=1, context_parallel_size=ranks, context_parallel_method="ring")
    config = TrainConfig(model, parallel, training=TrainingConfig(global_batch_size=1, microbatch_size=1))
    (span,) = stage_spans(config, plan_pipeline(config))
    exact, evenly = (
        sorted(attention_communication(config, span, rank, evenly=even)["send"] for rank in range(ranks))
        for even in (False, True)
    )
    assert evenly != exact
    assert evenly == pytest.approx(exact, rel=0.02)
