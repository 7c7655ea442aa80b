"""Start here when the cost model of an NVLink node picks whole products that published times say it should cut."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fused_megatron.overlap import ChunkChoice
from fused_megatron.overlap.group_costs import GroupTimes, TimedSizes, costs_of

MIB = 1 << 20
# All-reduces of NCCL in microseconds by MiB. 8 H100: pull request 42324 of vLLM. 2 A100: vTrain (MICRO 2024), 4 rows.
H100_8 = {0.5: 24, 2: 37, 4: 50, 8: 76, 16: 121, 32: 195, 64: 316, 128: 561}
A100_2 = {1: 44, 2: 53, 32: 230, 64: 405}
SIZES = TimedSizes((32 * MIB, 64 * MIB), 4096, 512, 4096, 2)


SMALL = SIZES._replace(message_bytes=(2 * MIB,))


def times_of(table, tflops, memory_gb_per_s, latency_us=20, beside=0.2):
    """Return what a group with this table measures; a transfer slows the product beside it by `beside`."""
    product_s = 2 * 4096**3 / (1e12 * tflops)
    message_s = 1e-6 * table[32]
    return GroupTimes(
        1e-6 * latency_us,
        (message_s, 1e-6 * table[64]),
        0.0,
        product_s,
        2 * 64 * MIB / (1e9 * memory_gb_per_s),
        product_s + beside * min(product_s, message_s),
    )


# Assumed: products at 650 and 250 TFLOP/s, memory at 2.8 and 1.7 TB/s; a transfer takes a fifth of its time from them.
TIMES = times_of(H100_8, 650, 2800)
H100, A100 = costs_of(TIMES, SIZES), costs_of(times_of(A100_2, 250, 1700), SIZES)


def test_bandwidth_is_of_large_messages():
    assert H100.bytes_per_s / 1e9 == pytest.approx(219, abs=1)
    # All the time of a message of 2 MiB would say 57.
    assert costs_of(TIMES._replace(latency_s=0.0, messages_s=(37e-6,)), SMALL).bytes_per_s == pytest.approx(
        57e9, rel=0.02
    )
    for mib, microseconds in H100_8.items():
        predicted = 1e6 * (H100.latency_s + mib * MIB / H100.bytes_per_s)
        assert predicted == pytest.approx(microseconds, rel=0.26), mib
    assert A100.bytes_per_s / 1e9 == pytest.approx(171, abs=1)


def test_a_gpu_reads_its_weight_at_the_speed_of_its_memory():
    assert H100.weight_s == pytest.approx(2 / 2.8e12)
    assert H100.flops_per_s == pytest.approx(650e12) and H100.slowdown == pytest.approx(0.2)
    assert H100.reads_beside
    # The QKV weight of 175B at tp=8, seven times.
    assert 7 * 12288 * 3 * 12288 / 8 * H100.weight_s == pytest.approx(0.28e-3, rel=0.02)


def test_a_cpu_is_timed_by_products_of_few_and_many_rows():
    sizes = TimedSizes((2 * MIB,), 512, 32, 256, 4)
    work_s, weight_s = 8e-3, 1e-3
    times = GroupTimes(1e-4, (1e-3,), work_s / 8 + weight_s, work_s + weight_s, 0.0, 1e9)
    found = costs_of(times, sizes)
    assert found.weight_s * 512**2 == pytest.approx(weight_s)
    assert found.flops_per_s == pytest.approx(2 * 256 * 512**2 / work_s)
    assert found.bytes_per_s == pytest.approx(2 * MIB / 9e-4) and found.slowdown == 1
    # Noise: many rows took less time than few.
    assert costs_of(times._replace(many_s=1.5e-3), sizes).weight_s * 512**2 == pytest.approx(0.5 * times.few_s)
    # Through shared memory a rank does its transfers itself.
    assert costs_of(times._replace(beside_s=float("inf")), sizes).slowdown == 1


def picks(group, monkeypatch, costs, hidden, ffn, qkv, rows):
    """Return the chunks of a layer's products under sequence parallelism, and of the plain layer's all-reduces."""
    monkeypatch.setattr(ChunkChoice, "measured", lambda self, group, like: costs)
    choice, ranks = ChunkChoice(), group.size()
    found = {}

    def x(width, n=rows):
        return torch.empty(1, dtype=torch.bfloat16).expand(n, 1, width)

    def weight(out, width):
        return torch.empty(1, dtype=torch.bfloat16).expand(out, width)

    for name, out, width in (("qkv", qkv // ranks, hidden), ("up", ffn // ranks, hidden)):
        found[f"{name} forward"] = choice.for_gather(x(width, rows // ranks), weight(out, width), 0, group)
        found[f"{name} backward"] = choice.for_reduction(x(out), weight(width, out), 0, group, 2)
    for name, out, width in (("output", hidden, hidden // ranks), ("down", hidden, ffn // ranks)):
        found[f"{name} forward"] = choice.for_reduction(x(width), weight(out, width), 0, group)
        found[f"{name} backward"] = choice.for_gather(x(out, rows // ranks), weight(width, out), 0, group)
        found[f"{name} all-reduce"] = choice.for_reduction(x(width), weight(out, width), None, group)
    found["mlp"] = choice.for_mlp(x(hidden, rows // ranks), ranks, 2 * hidden * ffn // ranks, group)
    found["mlp all-reduce"] = choice.for_mlp(x(hidden), 1, 2 * hidden * ffn // ranks, group)
    return found


# Numbers of chunks: of 8 products under sequence parallelism, of the MLP (forward, backward), and of plain all-reduces.
PICKS = {
    "7B, 2 A100": (
        2,
        A100,
        (4096, 16384, 3 * 4096, 4096),
        {
            "qkv forward": 2,
            "up forward": 2,
            "output forward": 6,
            "output backward": 3,
            "down forward": 12,
            "down backward": 2,
            "mlp": (12, 12),
            "output all-reduce": 6,
            "down all-reduce": 12,
            "mlp all-reduce": (12, 1),
        },
    ),
    "70B, 8 H100": (
        8,
        H100,
        (8192, 2 * 28672, 10240, 4096),
        {
            "qkv backward": 6,
            "up forward": 2,
            "output forward": 3,
            "down forward": 8,
            "down backward": 2,
            "mlp": (8, 8),
            "output all-reduce": 3,
            "down all-reduce": 8,
            "mlp all-reduce": (8, 1),
        },
    ),
    "175B, 8 H100": (
        8,
        H100,
        (12288, 4 * 12288, 3 * 12288, 2048),
        {
            "output forward": 3,
            "down forward": 6,
            "mlp": (6, 6),
            "output all-reduce": 3,
            "down all-reduce": 6,
            "mlp all-reduce": (6, 1),
        },
    ),
}


@pytest.mark.parametrize("name", PICKS)
def test_what_published_times_pick(name, monkeypatch):
    """State what is cut. A product that is not named is whole: the weight gradient hides its sum, or a chunk would
    read the weight R - 1 times again. On a GPU the layer times these chunks against the whole, and keeps the faster.
    """
    ranks, found_costs, shape, wanted = PICKS[name]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        found = picks(dist.group.WORLD, monkeypatch, found_costs, *shape)
    finally:
        dist.destroy_process_group()
    assert {key: number for key, number in found.items() if number != 1} == wanted


def test_costs_of_small_messages_cut_almost_nothing(monkeypatch):
    """A bandwidth that looks lower, with a weight term that holds launches, leaves most products whole."""
    small = TIMES._replace(messages_s=(37e-6,), latency_s=30e-6, copy_s=0.0, few_s=TIMES.many_s / 8 + 36e-6)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        found = picks(dist.group.WORLD, monkeypatch, costs_of(small, SMALL), 12288, 4 * 12288, 3 * 12288, 2048)
    finally:
        dist.destroy_process_group()
    assert {*found.values()} == {1, (1, 1)}
