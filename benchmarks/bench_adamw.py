"""Speed of an AdamW update of all weights of a few transformer blocks, against torch's fused AdamW.

Bytes: reads gradient, weight and both moments in float32; writes weight and moments. With bfloat16 parameters beside
the float32 weights: writes them, too. With clipping and zeroing: writes the gradient, too, where torch makes a pass for
the scale, one for the update and one for the zeros.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_megatron.benchmarking.side_by_side import EAGER, OURS, Bars, Comparison
from fused_megatron.checks import dtype_name

SHAPES = {"cpu": (2, 768), "gpu": (8, 4096), "quick": (1, 8)}  # blocks, hidden size
OPTIONS: dict[str, Any] = {"lr": 1e-4, "eps": 1e-8, "weight_decay": 0.1}
SCALE = 0.5


class Weights:
    """Weights, moments and gradients of a provider."""

    def __init__(self, blocks: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        of_block: list[tuple[int, ...]] = [
            (3 * hidden, hidden),
            (hidden, hidden),
            (4 * hidden, hidden),
            (hidden, 4 * hidden),
        ]
        of_block += [(hidden,)] * 4 + [(3 * hidden,), (hidden,), (4 * hidden,), (hidden,)]
        shapes = blocks * of_block

        def drawn() -> list[torch.Tensor]:
            return [torch.randn(shape, generator=generator).to(device) for shape in shapes]

        self.main, self.gradient = drawn(), drawn()
        self.low = [] if dtype == torch.float32 else [weight.to(dtype) for weight in self.main]

    def ours(self, adamw_: Callable[..., None], in_one: bool) -> Callable[[], None]:
        moments = [[torch.zeros_like(weight) for weight in self.main] for _ in range(2)]
        scale = torch.full((), SCALE if in_one else 1.0, device=self.main[0].device)
        steps = [0]

        def step() -> None:
            steps[0] += 1
            options = {"gradient_scale": scale, "zero_gradient": in_one, "low": self.low, **OPTIONS}
            adamw_(self.main, *moments, self.gradient, step=steps[0], **options)

        return step

    def theirs(self, in_one: bool) -> Callable[[], None]:
        for weight, gradient in zip(self.main, self.gradient, strict=True):
            weight.grad = gradient
        optimizer = torch.optim.AdamW(self.main, fused=True, **OPTIONS)

        def step() -> None:
            if in_one:
                torch._foreach_mul_(self.gradient, SCALE)
            optimizer.step()
            if self.low:
                torch._foreach_copy_(self.low, self.main)
            if in_one:
                torch._foreach_zero_(self.gradient)

        return step


@pytest.mark.parametrize("in_one", [False, True], ids=["update", "clip_update_zero"])
def test_adamw(bench, dtype, in_one):
    shape = bench.shape(**SHAPES)
    mine, torchs = (Weights(*shape, dtype, bench.device.device) for _ in range(2))
    steps = {OURS: mine.ours(bench.op("adamw_"), in_one), EAGER: torchs.theirs(in_one)}
    for step in steps.values():
        step()
    for found, wanted in zip((*mine.main, *mine.low), (*torchs.main, *torchs.low), strict=True):
        torch.testing.assert_close(found, wanted)
    elements = sum(weight.numel() for weight in mine.main)
    num_bytes = elements * (28 + 4 * in_one) + sum(low.nbytes for low in mine.low)
    bars = Bars(eager=1.5 if in_one else 0.83)
    op = "adamw + clip, zero" if in_one else "adamw"
    label = f"{len(mine.main)} tensors, {elements / 1e6:.1f} M"
    bench.in_place(Comparison(op, label, dtype_name(dtype), num_bytes, bars), steps)
