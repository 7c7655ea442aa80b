"""Start here when a dry run differs from the ranks that really run: what they hold, keep and send."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from fused_megatron.assembly.build import build_mesh, build_model, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.checks import InputError
from fused_megatron.config import BERTConfig, GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.models import StageSpan
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.planning.dry_run import DryRun, fake_ranks
from fused_megatron.testing import run_on_ranks

MODEL = GPTConfig(num_layers=5, hidden_size=32, num_heads=4, seq_len=16, vocab_size=101, recompute="selective")
CONFIG = TrainConfig(
    MODEL,
    ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2, data_parallel_size=1, sequence_parallel=True),
    training=TrainingConfig(global_batch_size=4, microbatch_size=2),
)
FLAT = dataclasses.replace(CONFIG, parallel=dataclasses.replace(CONFIG.parallel, pipeline_parallel_size=1))


def held_and_sent(rank: int, world_size: int) -> tuple[int, int, dict[str, int]]:
    """Parameters, their bytes, and what a microbatch of the whole model sends."""
    mesh = build_mesh(FLAT)
    model = build_model(FLAT, mesh, torch.device("cpu"), StageSpan(0, 1, 0, MODEL.num_layers))
    tokens = torch.zeros(2, MODEL.seq_len, dtype=torch.int64)
    with record_communication() as ledger:
        model.loss(model(tokens), tokens, reduction="sum").backward()
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters), dict(ledger.num_bytes)


def test_a_dry_rank_holds_and_sends_what_a_real_one_does() -> None:
    dry_run = DryRun()
    for rank, (num_parameters, parameter_bytes, sent) in enumerate(run_on_ranks(held_and_sent, 2)):
        facts = dry_run.rank(FLAT, rank)
        assert (facts.num_parameters, facts.parameter_bytes) == (num_parameters, parameter_bytes)
        assert facts.stages[0].sent_bytes == sent
        assert facts.groups == {"tp": (0, 1)} and facts.reduced_bytes == 0


def test_blocks_are_all_the_same() -> None:
    """A stage of many blocks keeps and sends what its ends and so many times one block do."""
    dry_run = DryRun()
    facts = dry_run.rank(CONFIG, 3)
    ((index, stage),) = facts.stages.items()
    plan = plan_pipeline(CONFIG)
    with fake_ranks(3, 4):
        mesh = build_mesh(CONFIG, "cpu")
        span = build_stages(CONFIG, mesh, plan, torch.device("meta")).spans[index]
        whole = dry_run._microbatch(CONFIG, mesh, span.first, span.last, span.stop - span.start)
    assert span.last and span.stop - span.start == 2
    assert stage == whole


def test_refused() -> None:
    dry_run = DryRun()
    with pytest.raises(InputError, match=r"rank=4 must be in \[0, 4\)"):
        dry_run.rank(CONFIG, 4)
    bert = BERTConfig(num_layers=2, hidden_size=32, num_heads=4, seq_len=16, vocab_size=101)
    with pytest.raises(InputError, match=r"model\.family='bert' must be 'gpt'"):
        dry_run.rank(dataclasses.replace(CONFIG, model=bert), 0)
    with fake_ranks(0, 4), pytest.raises(InputError, match="a dry run needs a process without a process group"):
        dry_run.rank(CONFIG, 0)
    assert not dist.is_initialized()
