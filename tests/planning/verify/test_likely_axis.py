"""Start here when verify blames the wrong part of a layout, or never tries a new part by itself."""

from dataclasses import replace

import pytest

from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.verify.layout_parts import (
    CONTEXT,
    DATA,
    MICROBATCHES,
    NEEDS,
    OVERLAP,
    PIPELINE,
    RECOMPUTE,
    SEQUENCE,
    TENSOR,
    parts_of,
    with_parts,
)
from fused_megatron.planning.verify.likely_axis import find_cause

ALL = tuple(NEEDS)


@pytest.mark.parametrize("part", ALL)
def test_a_part_that_is_wrong_by_itself_is_blamed(part: str) -> None:
    tried = []

    def differs(parts: tuple[str, ...]) -> bool:
        tried.append(parts)
        return part in parts

    cause = find_cause(ALL, differs)
    assert cause.parts == (part,) and not cause.together
    assert part not in cause.right and part in cause.describe()
    # Each part is tried with the parts that it needs, and with microbatches.
    assert all(set(NEEDS[each]) <= set(parts) for parts in tried for each in parts)
    assert all(MICROBATCHES in parts for parts in tried)


def test_two_parts_that_are_wrong_are_both_blamed() -> None:
    cause = find_cause(ALL, lambda parts: PIPELINE in parts or SEQUENCE in parts)
    assert set(cause.parts) == {PIPELINE, SEQUENCE} and not cause.together


def test_parts_that_are_wrong_only_together() -> None:
    cause = find_cause(ALL, lambda parts: {SEQUENCE, DATA} <= set(parts))
    assert cause.parts == (TENSOR, DATA) and cause.together
    assert "only together" in cause.describe()
    cause = find_cause(ALL, lambda parts: {TENSOR, DATA, PIPELINE} <= set(parts))
    assert cause.parts == (RECOMPUTE, TENSOR, PIPELINE, CONTEXT, DATA) and cause.together


def test_the_only_part_is_not_tried_again() -> None:
    cause = find_cause([DATA], lambda parts: pytest.fail("there is nothing to find out"))
    assert cause.parts == (DATA,)


def test_parts_of_a_config_are_switched_off_one_by_one() -> None:
    config = TrainConfig(
        GPTConfig(vocab_size=61, recompute="full", num_experts=4),
        ParallelConfig(
            tensor_parallel_size=2,
            pipeline_parallel_size=2,
            data_parallel_size=2,
            context_parallel_size=2,
            expert_parallel_size=4,
            sequence_parallel=True,
            schedule="zb_v",
            stages_per_rank=2,
            overlap=3,
        ),
        training=TrainingConfig(global_batch_size=12, microbatch_size=2),
    )
    assert parts_of(config) == ALL and config.parallel.num_ranks == 16
    for part in ALL:
        left = with_parts(config, [part, *NEEDS[part]])
        assert parts_of(left) == tuple(each for each in ALL if each in (part, *NEEDS[part]))
        assert left.parallel.num_ranks == 2 ** len({TENSOR, PIPELINE, CONTEXT, DATA} & {part, *NEEDS[part]})
        assert left.training.global_batch_size == 12
    # ZeRO is tried with data parallelism, or, without that, with context parallelism.
    sharded = replace(config, parallel=replace(config.parallel, zero_stage=3, zero_shard_size=4))
    only_context = with_parts(config, [CONTEXT, PIPELINE])
    assert with_parts(sharded, [CONTEXT]).parallel.zero_stage == 0
    assert with_parts(sharded, [DATA]).parallel.zero_stage == 3
    sharded = replace(only_context, parallel=replace(only_context.parallel, zero_stage=3))
    assert with_parts(sharded, [CONTEXT]).parallel.zero_stage == 3
    one = with_parts(config, ())
    assert parts_of(one) == () and one.training.microbatch_size == 12 and one.model.recompute == "none"
    assert OVERLAP not in parts_of(with_parts(config, [OVERLAP]))  # one rank has nothing to overlap
