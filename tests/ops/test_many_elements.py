"""Start here when an op goes wrong with more than 2^31 elements.

The last rows of a tensor of more than 2^31 elements, which 32-bit indices cannot reach, must equal the same rows in a
small tensor.

Needs about 10 GB of memory, so it is marked slow. (scaled_masked_softmax has its own such test.)
"""

import pytest
import torch

from fused_megatron import ops

WIDTH = 8200
ROWS = 2**31 // WIDTH + 5
LAST = 3

pytestmark = [pytest.mark.slow, pytest.mark.cpu_kernel]


@pytest.fixture(scope="module")
def many():
    x = torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[-LAST:] = torch.randn(LAST, WIDTH, generator=torch.Generator().manual_seed(0))
    return x


def forms():
    weight = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    state = torch.tensor([7, 11])
    whole = (ROWS, WIDTH)

    def dropped(x):
        offset = (ROWS - x.shape[0], 0)
        return ops.bias_dropout_add(x, weight, x, 0.3, rng_state=state, full_shape=whole, offset=offset)

    return {
        "bias_gelu": lambda x: ops.bias_gelu(x, weight),
        "bias_swiglu": lambda x: ops.bias_swiglu(x, weight),
        "layer_norm": lambda x: ops.layer_norm(x, weight, weight),
        "rms_norm": lambda x: ops.rms_norm(x, weight),
        "bias_dropout_add": dropped,
        "cross_entropy": lambda x: ops.cross_entropy(x, torch.ones(len(x), dtype=torch.int64), reduction="none"),
    }


@pytest.mark.parametrize("op", forms())
@torch.no_grad()
def test_last_rows(many, op):
    function = forms()[op]
    assert torch.equal(function(many)[-LAST:], function(many[-LAST:].clone()))
