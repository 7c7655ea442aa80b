"""Start here when a run on a GPU has weights of another dtype, or buckets of another size, than the planner says."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.config.training import default_bucket_mb
from fused_megatron.planning.dry_run_command import parse_options
from fused_megatron.planning.prediction.cluster import Cluster, load_cluster
from fused_megatron.planning.prediction.step_time import predict_step
from fused_megatron.planning.rank_memory import rank_memory
from fused_megatron.planning.search.best_layouts import find_best
from fused_megatron.training.device_settings import on_device

MODEL = GPTConfig(num_layers=2, hidden_size=64, num_heads=4, seq_len=16, vocab_size=128)


def test_a_gpu_has_bfloat16_weights_and_says_so() -> None:
    lines: list[str] = []
    on_cpu, on_gpu = (on_device(TrainConfig(MODEL), kind, lines.append).training for kind in ("cpu", "cuda"))
    assert (on_cpu.weight_dtype, on_gpu.weight_dtype) == ("float32", "bfloat16")
    (line,) = lines
    assert "bfloat16" in line and "--training.dtype float32" in line
    assert (on_cpu.element_bytes, on_gpu.element_bytes) == (4, 2)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_that_the_user_chose_stays(device_type: str, dtype: str) -> None:
    def say(line: str) -> None:
        raise AssertionError(line)

    config = TrainConfig(MODEL, training=TrainingConfig(dtype=dtype, bucket_mb=7.0))
    training = on_device(config, device_type, say).training
    assert (training.dtype, training.bucket_mb) == (dtype, 7.0)


def test_the_precision_of_products_is_set_only_if_asked() -> None:
    torch.set_float32_matmul_precision("high")
    on_device(TrainConfig(MODEL), "cpu")
    assert torch.get_float32_matmul_precision() == "high"
    on_device(TrainConfig(MODEL, training=TrainingConfig(matmul_precision="medium")), "cpu")
    assert torch.get_float32_matmul_precision() == "medium"
    with pytest.raises(InputError, match="matmul_precision='tf32' must be one of"):
        TrainingConfig(matmul_precision="tf32")


def test_buckets_grow_with_the_replicas_of_a_gpu() -> None:
    """Megatron takes 40 million parameters, or one million for each replica if that is more; 4 bytes each."""
    assert [default_bucket_mb("cuda", replicas) for replicas in (1, 8, 40, 64, 1024)] == [160, 160, 160, 256, 4096]
    assert {default_bucket_mb("cpu", replicas) for replicas in (1, 8, 1024)} == {25}
    on_cpu, on_gpu = (TrainingConfig().for_device(kind) for kind in ("cpu", "cuda"))
    assert [on_cpu.bucket_bytes(n) for n in (1, 64)] == [25e6, 25e6]
    assert [on_gpu.bucket_bytes(n) for n in (1, 64)] == [160e6, 256e6]


@pytest.mark.parametrize("replicas", [8, 64])
def test_the_planner_has_the_buckets_of_the_run(replicas: int) -> None:
    """Replicas that share gradients hold a bucket of whole gradients at a time."""

    def working(bucket_mb: float | None) -> int:
        parallel = ParallelConfig(data_parallel_size=replicas, zero_stage=2)
        training = TrainingConfig(global_batch_size=2 * replicas, microbatch_size=1, bucket_mb=bucket_mb)
        config = TrainConfig(dataclasses.replace(MODEL, hidden_size=1024, num_layers=24), parallel, training=training)
        return rank_memory(config.for_device("cuda")).total

    assert working(None) == working(default_bucket_mb("cuda", replicas)) != working(25.0)


def test_predictions_plans_and_dry_runs_take_the_dtype_of_the_device(tmp_path: Path) -> None:
    h100 = load_cluster("h100")
    cpu = dataclasses.replace(h100, device="cpu")
    training = TrainingConfig(microbatch_size=1)
    config = TrainConfig(MODEL, ParallelConfig(data_parallel_size=2), training=training)

    def predicted(dtype: str, cluster: Cluster) -> float:
        of_dtype = dataclasses.replace(config, training=dataclasses.replace(config.training, dtype=dtype))
        return predict_step(of_dtype, cluster).parts["data parallel"]

    assert predicted("auto", h100) == predicted("bfloat16", h100) != predicted("float32", h100)
    assert predicted("auto", cpu) == predicted("float32", cpu) != predicted("bfloat16", cpu)
    assert find_best(config, 2, h100, num_best=1).plans[0].config.training.dtype == "bfloat16"
    (tmp_path / "config.toml").write_text("[model]\nvocab_size = 128\n")
    for words, dtype, bucket_mb in (((), "bfloat16", None), (("--device", "cpu"), "float32", 25.0)):
        training = parse_options([str(tmp_path / "config.toml"), *words]).config.training
        assert (training.dtype, training.bucket_mb) == (dtype, bucket_mb)
