"""Start here when the time of a matrix product is predicted wrongly."""

import dataclasses

import pytest

from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.prediction.product_time import linear_s

GPU = dataclasses.replace(load_cluster("a100"), product_us=0.0)
CPU = dataclasses.replace(GPU, device="cpu")
ROWS, INPUTS = 4096, 4096


def test_a_linear_layer_is_three_products_of_the_same_operations():
    each = 2 * ROWS * INPUTS * 8192 / (1e12 * GPU.peak_tflops * GPU.product_efficiency)
    assert linear_s(GPU, 2, 1, ROWS, 8192, INPUTS) == pytest.approx((each, each, each))


@pytest.mark.parametrize(
    ("cluster", "size", "outputs", "inputs", "is_slow"),
    [
        (GPU, 2, 50257, INPUTS, True),
        (GPU, 2, 50260, INPUTS, True),
        (GPU, 2, INPUTS, 50257, True),
        (GPU, 4, 50260, INPUTS, False),
        (CPU, 2, 50257, INPUTS, False),
    ],
    ids=["odd", "multiple of 4", "odd input", "multiple of 4 in float32", "CPU"],
)
def test_rows_that_are_no_multiple_of_16_bytes_are_slow_on_a_gpu(cluster, size, outputs, inputs, is_slow):
    found = linear_s(cluster, size, 1, ROWS, outputs, inputs)
    padded = linear_s(cluster, size, 1, ROWS, -(-outputs // 8) * 8, -(-inputs // 8) * 8)
    assert all((slow > 2 * fast) == is_slow for slow, fast in zip(found, padded, strict=True))
