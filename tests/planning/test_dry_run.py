"""Start here when a dry run differs from real ranks in memory, computation or transfers."""

import dataclasses
import os
import random
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fused_megatron.checks import InputError
from fused_megatron.config import BERTConfig, GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.dry_run import DryRun, RankReport
from fused_megatron.planning.rank_memory import rank_memory
from fused_megatron.planning.recorded_step import STEP, fake_ranks, record_fake_step, record_real_step
from fused_megatron.planning.step_profile import Transfers, transfers_of
from fused_megatron.planning.step_recorder import Work
from fused_megatron.testing import run_cases_on_ranks

LLAMA: dict[str, Any] = {
    "activation": "swiglu",
    "normalization": "rms_norm",
    "position": "rotary",
    "num_kv_heads": 1,
    "linear_biases": False,
    "hidden_dropout": 0.1,
}


def config_of(
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    cp: int = 1,
    method: str = "ring",
    sp: bool = False,
    schedule: str | None = None,
    stages: int | None = None,
    microbatches: int = 3,
    zero: int | None = None,
    dtype: str = "float32",
    **model: Any,
) -> TrainConfig:
    """Return the config of a GPT with 2 blocks a stage, so wide that tensors held by gloo's threads hardly count."""
    num_layers = 2 * pp * (stages or 1)
    sizes = {"num_layers": num_layers, "hidden_size": 128, "num_heads": 4, "seq_len": 32, "vocab_size": 501}
    parallel = ParallelConfig(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        data_parallel_size=dp,
        context_parallel_size=cp,
        context_parallel_method=method,
        sequence_parallel=sp,
        schedule=schedule,
        stages_per_rank=stages,
        zero_stage=zero,
        overlap=False,
    )
    training = TrainingConfig(global_batch_size=2 * microbatches * dp, microbatch_size=2, dtype=dtype, bucket_mb=0.05)
    return TrainConfig(GPTConfig(**{**sizes, **model}), parallel, training=training)


def random_layouts(count: int) -> list[TrainConfig]:
    """Return random configs of 2 and 4 ranks."""
    draw = random.Random(17)
    shapes = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1), (1, 4, 1)]
    schedules = [
        ("1f1b", None),
        ("gpipe", None),
        ("interleaved_1f1b", 2),
        ("zb_h1", None),
        ("zb_v", 2),
        ("dual_pipe_v", 2),
    ]
    found: list[TrainConfig] = []
    draws = 0
    for index in range(count):
        tp, pp, dp = shapes[index % len(shapes)]
        schedule, stages = schedules[draws % len(schedules)] if pp > 1 else (None, None)
        draws += pp > 1
        form = draw.choice([{}, LLAMA, {"num_kv_heads": 2, "query_key_norm": True, "attention_dropout": 0.1}])
        found.append(
            config_of(
                tp=tp,
                pp=pp,
                dp=dp,
                sp=tp > 1 and draw.random() < 0.6,
                schedule=schedule,
                stages=stages,
                microbatches=draw.randint(1, 3) + (2 * pp if schedule == "dual_pipe_v" else pp if pp > 1 else 0),
                zero=index // len(shapes) % 2 if dp > 1 else None,
                dtype=draw.choice(["float32", "bfloat16"]),
                recompute=draw.choice(["none", "selective", "full"]),
                tied_embeddings=draw.random() < 0.6,
                **form,
            )
        )
    return found


FAST = [
    config_of(tp=2, sp=True, recompute="selective", dtype="bfloat16"),
    config_of(pp=2, schedule="interleaved_1f1b", stages=2, microbatches=5),
    config_of(dp=2, tied_embeddings=False, **LLAMA),
    config_of(cp=2, recompute="selective", **LLAMA),
]


def real_rank(rank: int, world_size: int, config: TrainConfig, shared_memory: bool) -> tuple[Any, ...]:
    """Return (bytes before the step, bytes after it, peak, transfers, parameters, FLOPs) of a real rank."""
    os.environ["FUSED_MEGATRON_SHARED_MEMORY"] = "on" if shared_memory else "off"
    step = record_real_step(config, torch.device("cpu"))
    work = step.work()
    transfers = transfers_of(work, step.assembly.mesh.sizes, step.assembly.mesh.expert_sizes)
    num_parameters = sum(parameter.numel() for parameter in step.assembly.parameters.values())
    peak = step.recorder.storages.peak(step.assembled).num_bytes
    for _ in range(4):  # a gloo thread releases a tensor when it starts its next operation
        dist.barrier()
    held_bytes = step.recorder.storages.held_bytes()
    step.assembly.executor.close()
    return step.assembled_bytes, held_bytes, peak, transfers, num_parameters, work[Work("flops")]


def assert_same(found: RankReport, real: tuple[Any, ...], name: str) -> None:
    assembled, held, peak, transfers, num_parameters, flops = real
    assert (found.assembled_bytes, found.held_bytes) == (assembled, held), name
    assert abs(found.peak_bytes - peak) <= 0.01 * peak, (name, found.peak_bytes, peak)
    assert sum(found.peak.values()) == found.peak_bytes
    assert dict(found.transfers) == transfers, name
    assert (found.num_parameters, found.flops) == (num_parameters, flops), name
    assert found.host_syncs == 1, name  # one read of loss, gradient norm and flags at the end of a step


def compare(configs: list[TrainConfig]) -> None:
    by_world: dict[int, list[TrainConfig]] = {}
    for config in configs:
        by_world.setdefault(DryRun(config).world_size, []).append(config)
    for world_size, of_world in by_world.items():
        cases = run_cases_on_ranks(real_rank, world_size, [(c, False) for c in of_world], timeout_s=900)
        for config, ranks in zip(of_world, cases, strict=True):
            dry_run = DryRun(config)
            for rank, real in enumerate(ranks):
                assert_same(dry_run.rank(rank), real, f"rank {rank} of {config}")


def test_a_dry_rank_holds_computes_and_sends_what_a_real_one_does() -> None:
    compare(FAST)


@pytest.mark.slow
def test_random_layouts() -> None:
    compare(random_layouts(20))


@pytest.mark.slow
def test_context_parallel_layouts() -> None:
    compare(
        [
            config_of(cp=4, zero=3, **LLAMA),
            config_of(cp=4, method="all_to_all+ring", recompute="full"),
            config_of(cp=2, method="all_gather", tp=2, sp=True, attention_dropout=0.1),
            config_of(cp=2, method="all_to_all", pp=2, schedule="zb_h1"),
            config_of(cp=2, dp=2, zero=2, dtype="bfloat16"),
            config_of(cp=3, seq_len=31, sliding_window=7, **LLAMA),
        ]
    )


def test_a_ring_of_a_gpu_sends_what_a_ring_of_a_cpu_sends() -> None:
    """Messages of tensors of the meta device, for which a fake group has no backend."""
    config = config_of(cp=2, microbatches=2, recompute="full")
    on_cpu, on_gpu = (DryRun(config, device).rank(1).transfers for device in ("cpu", "meta"))
    assert on_gpu["send", "cp"] == on_cpu["send", "cp"]


@pytest.mark.slow
def test_shared_memory_carries_the_same_transfers() -> None:
    """Memory is not compared: shared memory keeps a message until its ring reuses the slot, unlike a dry run."""
    config = FAST[0]
    (ranks,) = run_cases_on_ranks(real_rank, 2, [(config, True)])
    for rank, (assembled, _, _, transfers, *_) in enumerate(ranks):
        found = DryRun(config).rank(rank)
        assert (found.assembled_bytes, dict(found.transfers)) == (assembled, transfers)


@pytest.mark.parametrize(
    "config",
    [
        config_of(pp=2, microbatches=4, recompute="full"),
        pytest.param(config_of(pp=2, schedule="zb_v", stages=2, microbatches=6), marks=pytest.mark.slow),
        pytest.param(config_of(pp=2, schedule="dual_pipe_v", stages=2, microbatches=6), marks=pytest.mark.slow),
        pytest.param(
            config_of(tp=2, pp=2, dp=2, schedule="interleaved_1f1b", stages=2, microbatches=5, dtype="bfloat16"),
            marks=pytest.mark.slow,
        ),
        pytest.param(config_of(pp=2, schedule="gpipe", microbatches=4), marks=pytest.mark.slow),
    ],
    ids=["1f1b", "zb_v", "dual_pipe_v", "interleaved", "gpipe"],
)
def test_what_is_counted_on_is_what_a_run_of_all_microbatches_finds(config: TrainConfig) -> None:
    dry_run = DryRun(config)
    for rank in dry_run.pipeline_ranks()[:2]:
        found, whole = dry_run.rank(rank), record_fake_step(config, rank, torch.device("cpu"))
        peak, work = whole.recorder.storages.peak(whole.assembled), Counter[Work]()
        for (phase, _), done in whole.recorder.work.items():
            work.update(done if phase == STEP else {})
        assert (found.peak_bytes, found.held_bytes) == (peak.num_bytes, whole.held_bytes)
        assert found.at is not None and found.at[1] == peak.where.action
        assert found.flops == work[Work("flops")] and found.host_syncs == work[Work("host_syncs")]
        assert dict(found.transfers) == transfers_of(work, whole.assembly.mesh.sizes, whole.assembly.mesh.expert_sizes)


def test_ranks_of_one_form_share_a_run_under_their_own_names() -> None:
    config = config_of(pp=4, microbatches=4)
    dry_run = DryRun(config)
    second, third = (dry_run.rank(rank) for rank in dry_run.pipeline_ranks()[1:3])
    assert len(dry_run._known) == 1
    layers = [{memory.layer for memory in report.peak if memory.kind == "activations"} for report in (second, third)]
    assert layers == [{"blocks.2", "blocks.3"}, {"blocks.4", "blocks.5"}]
    assert third.peak_bytes < second.peak_bytes == DryRun(config).rank(1).peak_bytes


def test_kinds_of_a_step() -> None:
    sharded = config_of(tp=2, dp=2, recompute="selective", dtype="bfloat16")
    config = dataclasses.replace(sharded, parallel=dataclasses.replace(sharded.parallel, zero_stage=0))
    report = DryRun(config).rank(0)
    kinds, number = report.by_kind(), report.num_parameters
    # Main weights and moments are float32.
    assert (kinds["weights"], kinds["gradients"], kinds["optimizer state"]) == (2 * number, 4 * number, 12 * number)
    assert kinds["batch and buffers"] >= 2 * 8 * 3 * 2 * 32
    assert report.groups == {"tp": (0, 1), "dp": (0, 2)}
    assert report.transfers["all_reduce", "dp"].num_bytes == 4 * number
    assert report.transfers["all_reduce", "tp+dp"] == Transfers(1, 72)
    zero = DryRun(sharded).rank(0)
    assert zero.by_kind()["optimizer state"] == pytest.approx(6 * number, rel=0.01)
    assert zero.by_kind()["gradients"] > 4 * number  # also packed copies: the peak is in the last backward


def test_bert() -> None:
    model = BERTConfig(num_layers=2, hidden_size=64, num_heads=4, seq_len=32, vocab_size=201)
    config = dataclasses.replace(config_of(tp=2), model=model)
    (ranks,) = run_cases_on_ranks(real_rank, 2, [(config, False)])
    assert_same(DryRun(config).rank(1), ranks[1], "BERT")


def test_refused() -> None:
    config = config_of(tp=2, pp=2)
    with pytest.raises(InputError, match=r"rank=4 must be in \[0, 4\)"):
        DryRun(config).rank(4)
    with pytest.raises(InputError, match=r"model\.vocab_size=None must be given"):
        DryRun(dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=None)))
    with fake_ranks(0, 4), pytest.raises(InputError, match="a dry run needs a process without a process group"):
        DryRun(config).rank(0)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("schedule", "microbatches", "versions"), [("pipedream_2bw", 3, [2, 2]), ("pipedream", 1, [2, 1])]
)
def test_steps_that_overlap_hold_every_version_and_the_activations_of_1f1b(
    schedule: str, microbatches: int, versions: list[int]
) -> None:
    config = config_of(pp=2, dp=2, schedule=schedule, microbatches=microbatches, tied_embeddings=False)
    synchronous = config_of(pp=2, dp=2, microbatches=3, tied_embeddings=False)
    run, plain = DryRun(config), DryRun(synchronous)
    for rank, number in zip(run.pipeline_ranks(), versions, strict=True):
        found, one = run.rank(rank), plain.rank(rank)
        planned = rank_memory(config, found.pp_rank)
        assert found.by_kind()["weights"] == number * one.by_kind()["weights"] == planned.weights
        assert found.by_kind()["activations"] == one.by_kind()["activations"]
        older = (number - 1) * one.by_kind()["weights"]
        assert found.peak_bytes - one.peak_bytes == pytest.approx(older, rel=0.02)
        # The formula also has gradients that are summed while other microbatches are under way.
        more = planned.total - rank_memory(synchronous, found.pp_rank).total - older
        assert 0 <= more <= planned.gradients and found.peak_bytes <= 1.05 * planned.total
        assert found.flops * 3 == one.flops * microbatches
