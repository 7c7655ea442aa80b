"""Start here when linears with a shared input read a stale one, or its gradient is summed wrongly over ranks."""

import torch
import torch.distributed as dist

from fused_megatron.interop.sequence_region import SharedInput
from fused_megatron.testing import run_on_ranks


def shared_inputs(rank, world_size):
    """Let a second linear see x after x += 1; return both inputs and the gradient of x."""
    shared = SharedInput(dist.group.WORLD, users=2)
    leaf = torch.full((2,), 3.0, requires_grad=True)
    x = leaf * 1
    first = shared.take(x)
    again = shared.take(x)
    assert first is again, "one collective for both"
    first = shared.take(x)
    seen = first.tolist()
    x.add_(1)
    second = shared.take(x)
    assert second is not first
    (first.detach() * 0 + second).sum().backward()
    return seen, second.tolist(), leaf.grad.tolist()


def test_a_tensor_changed_in_place_is_another_input():
    for seen, second, gradient in run_on_ranks(shared_inputs, 2):
        assert (seen, second, gradient) == ([3.0, 3.0], [4.0, 4.0], [2.0, 2.0])
