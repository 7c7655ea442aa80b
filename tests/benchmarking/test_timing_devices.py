"""Start here when the copy speed, the product speed or the peak memory of a device looks wrong."""

import torch

from fused_megatron.benchmarking.timing_devices import (  # fmt: skip
    CpuDevice,
    FakeGpu,
    copy_step,
    find_gpus,
    measure_ceilings,
    page_faults,
)


def test_peak_bytes_counts_what_is_held_at_a_time():
    def step():
        first = torch.zeros(1000)
        second = first + 1  # both tensors are held
        del first, second
        return torch.zeros(500)

    # Besides, a few bytes of scalars.
    assert 8000 <= CpuDevice().peak_bytes(step) < 8100


def test_a_copy_moves_its_bytes():
    copied = copy_step(4096, torch.device("cpu"))()
    assert copied.nbytes == 2048
    ceilings = measure_ceilings(CpuDevice(), quick=True)
    assert set(ceilings) == {"copy_gb_per_s", "gemm_gflop_per_s float32", "gemm_gflop_per_s bfloat16"}
    assert all(ceiling > 0 for ceiling in ceilings.values())


def test_fake_gpus_stand_in_for_those_of_a_machine():
    (gpu,) = find_gpus(["H100"])
    assert isinstance(gpu, FakeGpu) and gpu.is_gpu and gpu.name == "fake H100"
    assert gpu.seconds(lambda: None) >= 0
    assert len(find_gpus()) == torch.cuda.device_count()


def test_page_faults_are_counted():
    before = page_faults()
    held = torch.ones(100 << 20, dtype=torch.uint8)
    assert page_faults() - before >= 0 and held[0] == 1
