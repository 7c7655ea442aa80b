"""Start here when runs that share the work of their blocks get another time than a run alone."""

import dataclasses
import itertools

from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.models import StageSpan
from fused_megatron.planning.prediction.block_time import StageTimes
from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.prediction.engine import OWN, engine_of

CLUSTER, ENGINE = load_cluster("h100"), engine_of(OWN)
MODEL = GPTConfig(num_layers=4, hidden_size=1024, num_heads=16, seq_len=512, vocab_size=32768)


def test_shared_work_of_blocks_is_each_run_s_own():
    shared = {}
    for recompute, zero_stage, dp in itertools.product(("none", "selective", "full"), range(4), (2, 4)):
        config = TrainConfig(
            model=dataclasses.replace(MODEL, recompute=recompute),
            parallel=ParallelConfig(tensor_parallel_size=2, data_parallel_size=dp, zero_stage=zero_stage),
            training=TrainingConfig(dtype="bfloat16", global_batch_size=8, microbatch_size=2),
        )
        span = StageSpan(0, 1, 0, 4)
        alone = StageTimes(config, CLUSTER, ENGINE).of_stage(span)
        assert StageTimes(config, CLUSTER, ENGINE, shared).of_stage(span) == alone
    assert {kind for _, kind in shared} == {"none", "selective", "full"}


def test_a_plain_block_does_not_send_what_a_recomputed_one_sends():
    """Context and expert parallelism send more in a recomputed block; a run may recompute some of its blocks only."""
    experts = {"num_experts": 4, "experts_per_token": 2, "linear_biases": False, "activation": "swiglu"}
    parallel = ParallelConfig(data_parallel_size=2, context_parallel_size=2, expert_parallel_size=2)

    def blocks(recompute, number):
        config = TrainConfig(
            model=dataclasses.replace(MODEL, recompute=recompute, recompute_blocks=number, **experts),
            parallel=parallel,
            training=TrainingConfig(dtype="bfloat16", global_batch_size=8, microbatch_size=2),
        )
        times = StageTimes(config, CLUSTER, ENGINE)
        return times.block(True, False), times.block(True, True)

    plain, recomputed = blocks("none", None)[0], blocks("full", None)[1]
    assert blocks("full", 2) == (plain, recomputed)
    for part in ("context_parallel", "expert_parallel"):
        assert getattr(recomputed.backward, part) > getattr(plain.backward, part) > 0
