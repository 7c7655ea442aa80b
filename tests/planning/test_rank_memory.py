"""Start here when the predicted memory of a rank differs from the memory of a training step."""

import dataclasses
import gc
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_megatron.benchmarking.timing_devices import CpuDevice
from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.dry_run import DryRun
from fused_megatron.planning.rank_memory import rank_memory
from fused_megatron.planning.working_memory import stage_bytes
from fused_megatron.testing import run_on_ranks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LLAMA = {
    "activation": "swiglu", "num_kv_heads": 1, "normalization": "rms_norm", "position": "rotary",
    "linear_biases": False, "tied_embeddings": False,
}  # fmt: skip


def config_of(dtype: str = "float32", batch: int = 2, *, parallel: Any = (), **form: Any) -> TrainConfig:
    model = GPTConfig(num_layers=4, hidden_size=256, num_heads=8, seq_len=128, vocab_size=2000, **form)
    training = TrainingConfig(global_batch_size=batch, microbatch_size=2, dtype=dtype)
    return TrainConfig(model, ParallelConfig(**dict(parallel)), training=training)


TENSOR, SEQUENCE = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "sequence_parallel": True}
CONFIGS = [
    config_of("bfloat16", parallel=SEQUENCE, recompute="selective"),
    config_of(parallel=TENSOR, query_key_norm=True, **LLAMA),
    config_of(batch=8, parallel={"pipeline_parallel_size": 2, "data_parallel_size": 1}, recompute="full"),
    config_of(batch=4, parallel={"data_parallel_size": 2}),
]


def peaks(rank: int, world_size: int) -> list[tuple[int, int, int]]:
    """Return for each config the peak bytes, number of parameters and pipeline rank of this rank."""
    os.environ["KINETO_LOG_LEVEL"] = "99"
    sys.path.insert(0, str(BENCHMARKS))
    from node_steps import build_trainer  # noqa: PLC0415 - of benchmarks

    found = []
    for config in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            made: list[Any] = []

            def begin(config: TrainConfig = config, folder: str = folder, made: list[Any] = made) -> None:
                made.append(build_trainer(config, torch.device("cpu"), Path(folder)))
                made[0].train_step()

            gc.collect()  # memory that is freed during the measurement would lower the peak
            peak = CpuDevice().peak_bytes(begin)
            assert peak is not None
            trainer = made.pop()
            found.append((peak, sum(p.numel() for p in trainer.parameters.values()), trainer.mesh.pp_rank))
            trainer.executor.close()
    return found


def test_peak_of_a_step() -> None:
    for rank in run_on_ranks(peaks, 2, timeout_s=600):
        for config, (peak, num_parameters, pp_rank) in zip(CONFIGS, rank, strict=True):
            memory = rank_memory(config, pp_rank)
            assert memory.num_parameters == num_parameters
            # The formula estimates temporary tensors. The 6e6 bytes are memory that does not grow with the model, such
            # as the tensors that measure a group's speed.
            assert 0.85 * memory.total < peak < 1.05 * memory.total + 6e6, (config, peak, memory)


@pytest.mark.parametrize(
    ("tp", "form"),
    [
        (1, {}),
        (2, {"query_key_norm": True, "position": "rotary", "num_kv_heads": 4}),
        (2, {**LLAMA, "recompute": "selective"}),
        (1, {"attention_dropout": 0.1, "query_key_norm": True, "num_kv_heads": 4}),
    ],
    ids=["gpt", "head norms", "llama", "attention dropout"],
)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_block_keeps_the_bytes_of_the_formula(tp: int, form: dict[str, Any], overlap: bool) -> None:
    config = config_of("bfloat16", 4, parallel={"tensor_parallel_size": tp, "overlap": overlap}, **form)
    (span,) = DryRun(config).spans
    kept = {memory.layer: num_bytes for memory, num_bytes in DryRun(config).rank(0).kept[0].items()}
    one_more = dataclasses.replace(span, stop=span.stop + 1)
    block = stage_bytes(config, one_more).kept - stage_bytes(config, span).kept
    # Without biases the norm after a block makes the stream: of the next block, or the final norm.
    tokens = config.training.microbatch_size * config.model.seq_len
    stream = 0 if config.model.linear_biases else 2 * tokens * config.model.hidden_size
    assert kept["blocks.0"] == block - stream
    assert {kept[f"blocks.{index}"] for index in range(1, 4)} == {block}
    statistics = 4 if config.model.normalization == "rms_norm" else 8
    assert kept["final_norm"] == stream + tokens * (2 * config.model.hidden_size + statistics)


@pytest.mark.parametrize("recompute", ["full", pytest.param("selective", marks=pytest.mark.slow)])
def test_only_the_first_blocks_of_a_stage_are_recomputed(recompute: str) -> None:
    some = config_of("bfloat16", 4, recompute=recompute, recompute_blocks=1, position="rotary")
    (span,) = DryRun(some).spans
    kept = {memory.layer: num_bytes for memory, num_bytes in DryRun(some).rank(0).kept[0].items()}
    whole = {
        form: stage_bytes(dataclasses.replace(some, model=dataclasses.replace(some.model, **changes)), span).kept
        for form, changes in {
            "none": {"recompute": "none", "recompute_blocks": None},
            "all": {"recompute_blocks": None},
            "more than all": {"recompute_blocks": 9},
        }.items()
    }
    assert kept["blocks.0"] < kept["blocks.1"] == kept["blocks.2"] == kept["blocks.3"]
    assert whole["none"] - stage_bytes(some, span).kept == kept["blocks.1"] - kept["blocks.0"]
    assert whole["none"] - whole["all"] == 4 * (kept["blocks.1"] - kept["blocks.0"])
    assert whole["more than all"] == whole["all"]


def test_context_parallel_ranks_keep_their_part() -> None:
    """The two ranks have 65 and 64 of 129 positions; attention keeps no probabilities, also with dropout."""
    config = config_of("bfloat16", 4, parallel={"context_parallel_size": 2, "zero_stage": 0}, attention_dropout=0.1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, seq_len=129))
    dry_run = DryRun(config)
    one_more = dataclasses.replace(dry_run.spans[0], stop=dry_run.spans[0].stop + 1)
    block = stage_bytes(config, one_more).kept - stage_bytes(config, dry_run.spans[0]).kept
    for rank, positions in enumerate((65, 64)):
        kept = {memory.layer: num_bytes for memory, num_bytes in dry_run.rank(rank).kept[0].items()}
        assert kept["blocks.1"] * 65 == block * positions


def test_the_fullest_rank_of_a_pipeline() -> None:
    """The first rank keeps the most microbatches; every part equals its formula."""
    config = config_of("bfloat16", batch=16, parallel={"pipeline_parallel_size": 4})
    first, second, *_ = ranks = [rank_memory(config, rank) for rank in range(4)]
    assert rank_memory(config) == max(ranks, key=lambda memory: memory.total)
    assert first.activations > second.activations > ranks[2].activations
    weights = dataclasses.astuple(second)[:4]
    block = 12 * 256**2 + 13 * 256
    assert weights == (block, 2 * block, 4 * block, 12 * block)
    # The second of 4 stages keeps 3 microbatches: 16 widths, and the statistics of the kernel and the norms.
    tokens = 2 * 128
    assert second.activations == 3 * tokens * (2 * (4 + 4 + 8) * 256 + 4 * 8 + 16)
    replicas = rank_memory(dataclasses.replace(config, parallel=ParallelConfig(pipeline_parallel_size=4)), 0, 2)
    assert replicas.activations == first.activations  # 4 microbatches fill a pipeline of 4 as 8 microbatches do
    assert replicas.optimizer == -(-first.optimizer // 24) * 12  # each replica has the state of half the parameters


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_attention_with_dropout_holds_four_tensors_of_scores(recompute: str) -> None:
    config = config_of("float32", 2, recompute=recompute, attention_dropout=0.1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=2, seq_len=256))
    assert rank_memory(config).total == pytest.approx(DryRun(config).rank(0).peak_bytes, rel=0.03)


def test_sharded_gradients_of_two_microbatches_are_under_way() -> None:
    """A bucket holds all gradients: its copy stays until the bucket of the next microbatch but one is sent."""
    config = config_of("float32", 16, parallel={"data_parallel_size": 2, "zero_stage": 2}, tied_embeddings=False)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=2))
    assert rank_memory(config).total == pytest.approx(DryRun(config).rank(0).peak_bytes, rel=0.1)


def test_no_vocabulary() -> None:
    with pytest.raises(InputError, match="vocab_size=None must be given"):
        rank_memory(TrainConfig())
