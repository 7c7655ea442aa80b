"""Times of matrix products on a cluster."""

from fused_megatron.planning.prediction.cluster import Cluster

_LOAD_BYTES = 16
"""Bytes that a thread of a GPU loads at once, if the rows of an operand begin at multiples of them."""
_UNALIGNED_SPEED = 0.46
"""Speed of a product on a GPU whose tensor cores wait for smaller loads: fitted to heads with 50,257 columns."""


def product_s(cluster: Cluster, size: int, count: float, m: float, n: float, k: float, speed: float = 1.0) -> float:
    """Return the seconds of `count` products [m, k] x [k, n] in one kernel.

    Args:
        cluster: the machine.
        size: bytes of an element.
        count, m, n, k: of the products.
        speed: share of the speed of large products that these reach.
    """
    rate = 1e12 * cluster.peak_tflops * cluster.product_efficiency * speed
    moved = size * count * (m * k + k * n + m * n)
    seconds = max(2 * count * m * n * k / rate, moved / (1e9 * cluster.memory_gb_per_s))
    return seconds + 1e-6 * cluster.product_us


def linear_s(
    cluster: Cluster, size: int, count: float, rows: float, outputs: int, inputs: int
) -> tuple[float, float, float]:
    """Return the seconds of the products of `count` linear layers: output, gradient of the input, of the weight."""
    aligned = size * outputs % _LOAD_BYTES == 0 and size * inputs % _LOAD_BYTES == 0
    speed = 1.0 if aligned or cluster.device == "cpu" else _UNALIGNED_SPEED
    return (
        product_s(cluster, size, count, rows, outputs, inputs, speed),
        product_s(cluster, size, count, rows, inputs, outputs, speed),
        product_s(cluster, size, count, outputs, inputs, rows, speed),
    )
