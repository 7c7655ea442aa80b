"""Start here when the doctor names another attention backend than torch takes, or its two ranks fail."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig
from fused_megatron.doctor.facts import GpuTrials
from fused_megatron.doctor.gpu_trials import attention_backends, cudnn_text, sdpa_backend, try_gpus, try_two_ranks

CPU = torch.device("cpu")


def test_a_machine_without_gpus_is_not_tried() -> None:
    assert try_gpus(0) == GpuTrials()


def test_the_backend_is_the_one_that_torch_takes() -> None:
    query, key = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    assert sdpa_backend(query, key, causal=True) == ("FLASH_ATTENTION", "torch's first choice")
    with sdpa_kernel(SDPBackend.MATH):
        backend, reason = sdpa_backend(query, key, causal=True)
    assert backend == "MATH"
    assert "not FLASH_ATTENTION" in reason and "not EFFICIENT_ATTENTION" in reason and "\n" not in reason


def test_the_shape_is_the_config_of_a_rank() -> None:
    model = GPTConfig(num_layers=2, hidden_size=64, num_heads=8, num_kv_heads=2, seq_len=16, vocab_size=64)
    config = TrainConfig(model, ParallelConfig(tensor_parallel_size=2))
    (found,) = attention_backends(CPU, config)
    assert (found.inputs, found.kernel) == ("float32, 4 heads, 1 of keys, head_dim 8", "FLASH_ATTENTION")
    common = attention_backends(CPU)
    assert [each.inputs.partition(",")[0] for each in common] == ["bfloat16", "bfloat16", "float32"]


def test_two_ranks_add_up() -> None:
    found = try_two_ranks("cpu")
    assert found.problem is None and found.gb_per_s is not None and found.gb_per_s > 0
    assert not found.maps_memory


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="two GPUs do not fail")
def test_ranks_that_fail_say_why_in_one_line() -> None:
    found = try_two_ranks("cuda")
    assert found.gb_per_s is None and found.problem and "\n" not in found.problem


def test_version_of_cudnn() -> None:
    assert [cudnn_text(version) for version in (92000, 91501, 8902)] == ["9.20.0", "9.15.1", "8.9.2"]
