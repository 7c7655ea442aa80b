"""Speed of a large matrix product on this rank's device: the denominator of MFU during a run."""

import time

import torch

# On a CPU large enough for its full speed within a tenth, and over in milliseconds.
_CPU_SIZE, _GPU_SIZE = 512, 8192
_ROUNDS = 4


def product_flops_per_s(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Measure the FLOP/s of a square matrix product; the best of a few rounds, after one to warm up.

    Ranks that share a machine must call it at the same time, since they share its cores. Takes 30 ms on two cores.

    Args:
        device: to measure.
        dtype: of the product.
        size: rows and columns; None: 512 on a CPU, 8192 on a GPU.

    Memory: three matrices, on a GPU 400 MB in bfloat16, which are freed.
    """
    size = size or (_GPU_SIZE if device.type == "cuda" else _CPU_SIZE)
    # Not random: a draw would change the random numbers of the run.
    a, b = (torch.full((size, size), value, device=device, dtype=dtype) for value in (0.5, 0.25))
    product = torch.empty_like(a)
    seconds = []
    for _ in range(_ROUNDS + 1):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
