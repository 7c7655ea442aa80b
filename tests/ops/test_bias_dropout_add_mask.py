"""Start here when dropout masks differ between layouts, or repeat."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_megatron.ops import bias_dropout_add
from fused_megatron.reference.bias_dropout_add import global_indices
from fused_megatron.reference.philox import keep_mask, keep_scale
from fused_megatron.testing.tolerances import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = (0x1234_5678_9ABC, 77)


def rng(device, seed=SEED):
    return torch.tensor(seed, device=device)


def inputs(shape, dtype, device):
    """Return x, bias, residual and dy."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, shape[-1:], shape, shape)
    return [torch.randn(size, generator=generator).to(dtype).to(device) for size in sizes]


def run(fn, x, bias, residual, dy):
    """Return y and the gradients of x, bias and residual."""
    leaves = [t.detach().requires_grad_() for t in (x, bias, residual)]
    y = fn(*leaves)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def keep_of(shape, device, p, seed=SEED):
    index = torch.arange(torch.Size(shape).numel(), device=device).reshape(shape)
    return keep_mask(rng(device, seed), index, p)


def mask_of(shape, device, p=0.4, dtype=torch.float32, **arguments):
    ones, zeros = torch.ones(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
    arguments.setdefault("rng_state", rng(device))
    return bias_dropout_add(ones, None, zeros, p, **arguments) != 0


def slices(shape, device, full_shape, offset, seed=SEED, dtype=torch.float32):
    return mask_of(shape, device, dtype=dtype, full_shape=full_shape, offset=offset, rng_state=rng(device, seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shard_draws_its_slice_of_the_whole_mask(dtype, device):
    full = (6, 4, 40)
    whole = keep_of(full, device, 0.4)
    assert torch.equal(mask_of(full, device, dtype=dtype), whole)
    # Along the sequence, the batch, the hidden dim and all at once; into parts whose rows begin at any lane.
    for parts in ((3, 1, 1), (1, 2, 1), (1, 1, 5), (2, 2, 2), (1, 1, 4)):
        size = tuple(f // n for f, n in zip(full, parts, strict=True))
        for place in itertools.product(*map(range, parts)):
            offset = tuple(i * s for i, s in zip(place, size, strict=True))
            box = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
            assert torch.equal(slices(size, device, full, offset, dtype=dtype), whole[box]), (parts, place)
    # Shards of irregular sizes, with a width that allows wide accesses, and rows that begin anywhere in a block.
    for first in (1, 2, 3, 4, 5, 6, 7):
        shard = slices((2, 3, 24), device, full, (1, 1, first), dtype=dtype)
        assert torch.equal(shard, whole[1:3, 1:4, first : first + 24])


def test_shards_of_other_ranks_of_tensors(device):
    for full, shape, offset in [
        ((50,), (13,), (7,)),
        ((10, 33), (4, 33), (5, 0)),
        ((10, 33), (10, 8), (0, 21)),
        ((3, 4, 2, 24), (1, 4, 2, 24), (2, 0, 0, 0)),
        ((3, 4, 2, 24), (3, 2, 2, 16), (0, 1, 0, 8)),
        ((3, 1, 2, 24), (2, 1, 1, 24), (1, 0, 1, 0)),
    ]:
        box = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
        assert torch.equal(slices(shape, device, full, offset), keep_of(full, device, 0.4)[box])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_shard_are_the_slice(dtype, device):
    full, offset, shape = (5, 3, 48), (1, 1, 7), (3, 2, 32)
    box = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
    x, bias, residual, dy = inputs(full, dtype, device)

    def shard(*tensors):
        return bias_dropout_add(*tensors, 0.3, rng_state=rng(device), full_shape=full, offset=offset)

    whole = run(lambda *t: bias_dropout_add(*t, 0.3, rng_state=rng(device)), x, bias, residual, dy)
    part = run(shard, x[box], bias[box[-1]], residual[box], dy[box])
    for i in (0, 1, 3):
        assert torch.equal(part[i], whole[i][box])
    sums = (dy[box].double() * keep_of(full, device, 0.3)[box] * keep_scale(0.3)).sum((0, 1))
    assert_close_to_reference(part[2], sums, floor_ulps=4.0)


def test_indices_beyond_32_bits(device):
    full, start = (2**31, 40), 2**31 - 3
    mask = slices((2, 40), device, full, (start, 0))
    index = start * 40 + torch.arange(80, device=device).reshape(2, 40)
    assert torch.equal(mask, keep_mask(rng(device), index, 0.4))
    # The upper half of a block's number matters: with another upper half the same lower half draws another mask.
    assert not torch.equal(mask, keep_mask(rng(device), index % 2**35, 0.4))
    # Rows with two strides, and more rows in the inner dim than 32 bits can count.
    rows = (2**40, 2**20, 3, 2**42)
    index = global_indices(torch.Size((3, 4)), rows, torch.device(device))
    ones = torch.ones(3, 4, device=device)
    forward = torch.ops.fused_megatron.bias_dropout_add_forward
    mask = forward(ones, None, torch.zeros_like(ones), rng(device), 0.4, *rows) != 0
    assert torch.equal(mask, keep_mask(rng(device), index, 0.4))


def test_seed_and_offset_change_the_mask_and_nothing_else_does(device):
    shape = (8, 64)
    first = mask_of(shape, device)
    assert torch.equal(first, mask_of(shape, device, dtype=torch.bfloat16))
    for more in ((1, 0), (0, 1), (2**32, 0), (0, 2**32)):
        seed = (SEED[0] + more[0], SEED[1] + more[1])
        other = slices(shape, device, shape, None, seed=seed)
        assert torch.equal(other, keep_of(shape, device, 0.4, seed))
        assert 0.2 < (other != first).double().mean() < 0.8
    state = rng(device)
    mask_of(shape, device, rng_state=state)
    assert state.tolist() == list(SEED)


def test_two_calls_differ_and_manual_seed_repeats(device):
    def draw():
        return mask_of((16, 64), device, rng_state=None)

    torch.manual_seed(3)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(draw(), first) and torch.equal(draw(), second)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_replays_the_mask(reentrant, device):
    x, bias, residual, dy = inputs((6, 32), torch.float32, device)

    def block(x):
        return bias_dropout_add(x * x, bias, residual, 0.5).sin()

    results = []
    for call in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        leaf = x.detach().requires_grad_()
        y = call(leaf)
        results.append([y, *torch.autograd.grad(y, leaf, dy)] if not reentrant else [y, _backward(y, leaf, dy)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _backward(y, leaf, dy):
    y.backward(dy)  # the reentrant form does not support torch.autograd.grad
    return leaf.grad


def test_backward_uses_the_mask_of_forward(device):
    x, _, residual, _ = inputs((12, 96), torch.float32, device)
    x.requires_grad_()
    y = bias_dropout_add(x, None, torch.zeros_like(residual), 0.5)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad != 0, y != 0)
    assert torch.equal(x.grad.unique(), torch.tensor([0.0, 2.0], device=device))


def test_mask_statistics(device):
    """The kept fraction, in total and per lane, and the independence of neighbours, to 4 standard deviations."""
    p, n = 0.1, 2**16
    keep = mask_of((n // 512, 512), device, p=p).flatten().double()
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 4 * sigma
    assert (keep.reshape(-1, 8).mean(0) - (1 - p)).abs().max() < 4 * 8**0.5 * sigma
    centred = keep - keep.mean()
    for lag in (1, 2, 3, 4, 8, 512):
        assert abs((centred[lag:] * centred[:-lag]).mean() / centred.var()) < 4 / n**0.5
