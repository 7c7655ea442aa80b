"""Start here when a gradient through a collective is wrong by the number of ranks."""

import os

import pytest
import torch
import torch.distributed as dist

from fused_megatron import collectives
from fused_megatron.checks import InputError
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.testing import run_cases_on_ranks, run_on_ranks

PAIRS = {
    "identity_all_reduce": (None, "all_reduce"),
    "all_reduce_identity": ("all_reduce", None),
    "all_gather_reduce_scatter": ("all_gather", "reduce_scatter"),
    "all_gather_split": ("all_gather", None),
    "reduce_scatter_all_gather": ("reduce_scatter", "all_gather"),
    "split_all_gather": (None, "all_gather"),
}


def block(x, dim, rank, ranks):
    return x.chunk(ranks, dim)[rank]


def expected(kind, parts, dim, rank):
    """Return the definition of each one-way collective as a function of the parts of all ranks."""
    if kind == "all_reduce":
        return torch.stack(parts).sum(0)
    if kind == "all_gather":
        return torch.cat(parts, dim)
    if kind == "reduce_scatter":
        return block(torch.stack(parts).sum(0), dim, rank, len(parts))
    if kind == "split":
        return block(parts[rank], dim, rank, len(parts))
    return parts[rank]


def one_pair(rank, world_size, name, shape, dim, dtype, layout):
    group = dist.group.WORLD
    apply = getattr(collectives, name)
    arguments = () if name in ("identity_all_reduce", "all_reduce_identity") else (dim,)
    forward, backward = name.split("_", 1) if name.startswith(("identity", "split")) else name.rsplit("_", 1)
    if name in ("all_gather_reduce_scatter", "reduce_scatter_all_gather"):
        forward, backward = PAIRS[name]

    def parts(shape, salt):
        # Small whole numbers, whose sums are exact in every dtype, so that results must be equal.
        make = [torch.Generator().manual_seed(10 * salt + r) for r in range(world_size)]
        return [torch.randint(-8, 9, shape, generator=g).to(dtype) for g in make]

    xs = parts(shape, 1)
    x = laid_out(xs[rank], layout).requires_grad_()
    before = x.detach().clone()
    with record_communication() as seen:
        y = apply(x, *arguments, group)
    assert seen.counts == ({PAIRS[name][0]: 1} if PAIRS[name][0] else {})
    assert torch.equal(y, expected(forward, xs, dim, rank)) and y.dtype == dtype
    dys = parts(y.shape, 2)
    dy = laid_out(dys[rank], layout)
    dy_before = dy.clone()
    with record_communication() as seen:
        (dx,) = torch.autograd.grad(y, x, dy)
    assert seen.counts == ({PAIRS[name][1]: 1} if PAIRS[name][1] else {})
    assert torch.equal(dx, expected(backward, dys, dim, rank)) and dx.dtype == dtype
    assert torch.equal(x, before) and torch.equal(dy, dy_before), "the caller's tensors must stay as they are"


def laid_out(x, layout):
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)[..., 1::2]
        return wide.copy_(x)
    return x.clone()


FORMS = {
    2: [
        ((4, 3, 2), 0, torch.float32),
        ((3, 2, 6), -1, torch.bfloat16),
        ((1, 4, 3), 1, torch.float64),
        ((4, 0, 3), 0, torch.float32),
    ],
    3: [((2, 6, 5), 1, torch.float16)],
}


@pytest.mark.parametrize("ranks", FORMS)
def test_values_and_gradients(ranks):
    layouts = "contiguous", "transposed", "strided"
    cases = [(name, *form, layout) for name in PAIRS for form in FORMS[ranks] for layout in layouts]
    run_cases_on_ranks(one_pair, ranks, cases)


def refuse_uneven(rank, world_size):
    x = torch.zeros(3, 5)
    for apply in (collectives.split_all_gather, collectives.reduce_scatter_all_gather):
        with pytest.raises(InputError, match=r"shape\[1\]=5 must be divisible by group size=2 \(nearest: 4, 6\)"):
            apply(x, 1, dist.group.WORLD)


def test_uneven_sizes_are_refused_on_every_rank():
    run_on_ranks(refuse_uneven, 2)


def together(rank, world_size):
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    frozen = torch.tensor([5.0])
    bias = torch.tensor([[3.0]], dtype=torch.bfloat16, requires_grad=True)
    tensors = collectives.identity_all_reduce_together((weight, frozen, bias), dist.group.WORLD)
    with record_communication() as seen:
        loss = (tensors[0] * torch.tensor([1.0, 10.0]) * (rank + 1)).sum() + tensors[2].float().sum() * (rank + 2)
        loss.backward()
    assert seen.counts == {"all_reduce": 1} and seen.elements == {"all_reduce": 3}
    assert torch.equal(weight.grad, torch.tensor([6.0, 60.0])) and torch.equal(
        bias.grad, torch.tensor([[9.0]]).bfloat16()
    )
    assert torch.equal(tensors[1], frozen) and bias.grad.dtype == torch.bfloat16


def test_several_tensors_take_one_collective():
    run_on_ranks(together, 3)


def test_no_group_is_no_op():
    x = torch.randn(3, 4)
    assert collectives.identity_all_reduce(x, None) is x and collectives.all_reduce_identity(x, None) is x
    for name in list(PAIRS)[2:]:
        assert getattr(collectives, name)(x, 0, None) is x
    assert collectives.identity_all_reduce_together((x,), None)[0] is x


def sum_of_bfloat16(rank, world_size):
    """Sum over gloo, which rounds 16-bit numbers after every addition: 256 + 1 is 256."""
    os.environ["FUSED_MEGATRON_SHARED_MEMORY"] = "off"
    weight = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    (shared,) = collectives.identity_all_reduce_together((weight,), dist.new_group())
    shared.backward(torch.full((3,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16))
    return weight.grad


def test_gradients_of_replicated_16_bit_parameters_are_summed_in_float32():
    for gradient in run_on_ranks(sum_of_bfloat16, 4):
        assert gradient.dtype == torch.bfloat16 and gradient.tolist() == [260.0] * 3  # 259, rounded once
