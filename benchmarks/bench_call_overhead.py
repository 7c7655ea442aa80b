"""Python overhead of a forward call: its time beyond the library's own op, on tiny tensors, with gradients recorded."""

from functools import partial

import pytest
import torch

BAR_US = 15
# It takes the place of three calls: two norms and a rotation.
BARS_US = {"query_key_norm": 3 * BAR_US}


def tiny(*shape):
    return torch.randn(shape, requires_grad=True)


CALLS = {
    "bias_gelu": lambda op: (op, tiny(2, 8), tiny(8)),
    "bias_swiglu": lambda op: (op, tiny(2, 16), tiny(16)),
    "bias_geglu": lambda op: (op, tiny(2, 16), tiny(16)),
    "layer_norm": lambda op: (op, tiny(2, 8), tiny(8), tiny(8)),
    "rms_norm": lambda op: (op, tiny(2, 8), tiny(8)),
    "bias_dropout_add": lambda op: (op, tiny(2, 8), tiny(8), tiny(2, 8)),
    "rotary_embedding": lambda op: (op, tiny(2, 1, 1, 8), tiny(2, 1, 1, 8), torch.rand(2, 4), torch.rand(2, 4)),
    "query_key_norm": lambda op: (
        partial(op, num_heads=1, num_kv_heads=1),
        *(tiny(2, 1, 24), tiny(8), tiny(8), torch.rand(2, 4), torch.rand(2, 4)),
    ),
    "scaled_masked_softmax": lambda op: (op, tiny(1, 1, 2, 8)),
    "cross_entropy": lambda op: (op, tiny(2, 8), torch.tensor([1, 2])),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_overhead(bench, name):
    op, *inputs = CALLS[name](bench.op(name))
    bench.overhead(name, lambda: op(*inputs), BARS_US.get(name, BAR_US))
