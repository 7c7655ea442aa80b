"""Start here when a column- or row-parallel linear layer gives a wrong value or gradient, or sends too much."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.overlap import overlap_costs
from fused_megatron.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_parallel_linear,
    parameter_shard,
)
from fused_megatron.testing import assert_close, run_cases_on_ranks, run_on_ranks

S, B, IN, OUT = 12, 3, 76, 92  # multiples of 4, so that 1, 2 and 4 ranks divide every sharded dim


def cut(x, dim, rank, ranks):
    return x.chunk(ranks, dim)[rank]


def truth(dtype, sequence_dim, device_dtype):
    """Return x, w, b, dy in dtype, and torch's y, dx, dw, db in device_dtype from the same rounded inputs."""
    generator = torch.Generator().manual_seed(5)
    shape = (S, B) if sequence_dim == 0 else (B, S)
    x, w, b, dy = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)
        for s in [(*shape, IN), (OUT, IN), (OUT,), (*shape, OUT)]
    )
    leaves = [t.to(device_dtype).requires_grad_() for t in (x, w, b)]
    y = F.linear(*leaves)
    return (x, w, b, dy), (y.detach(), *torch.autograd.grad(y, leaves, dy.to(device_dtype)))


def layer_case(rank, ranks, kind, sequence_parallel, sequence_dim, dtype, skip_bias_add, overlap):
    group = dist.group.WORLD if ranks > 1 else None
    (x, w, b, dy), expected = truth(dtype, sequence_dim, torch.float64)
    _, by_torch = truth(dtype, sequence_dim, dtype)
    options = {"sequence_parallel": sequence_parallel, "sequence_dim": sequence_dim, "skip_bias_add": skip_bias_add}
    options["overlap"] = overlap
    cls = ColumnParallelLinear if kind == "column" else RowParallelLinear
    layer = cls(IN, OUT, tp_group=group, dtype=dtype, **options)
    shard_w, shard_b = (
        (lambda t: cut(t, 0, rank, ranks),) * 2 if kind == "column" else (lambda t: cut(t, 1, rank, ranks), lambda t: t)
    )
    own_sequence = (lambda t: cut(t, sequence_dim, rank, ranks)) if sequence_parallel else (lambda t: t)
    own_features = lambda t: cut(t, -1, rank, ranks)  # noqa: E731
    own_x, own_y = (own_sequence, own_features) if kind == "column" else (own_features, own_sequence)
    with torch.no_grad():
        layer.weight.copy_(shard_w(w))
        layer.bias.copy_(shard_b(b))
    x_local = own_x(x).clone().requires_grad_()
    dy_local = own_y(dy)  # not contiguous where the features are cut
    before = x_local.detach().clone(), dy_local.clone()
    y = layer(x_local)
    if skip_bias_add:
        y = y[0] + y[1]
    y.backward(dy_local)
    assert torch.equal(x_local, before[0]) and torch.equal(dy_local, before[1])
    shards = own_y, own_x, shard_w, shard_b
    actual = y.detach(), x_local.grad, layer.weight.grad, layer.bias.grad
    for name, mine, shard, want, torch_result in zip(
        ["y", "dx", "dw", "db"], actual, shards, expected, by_torch, strict=True
    ):
        assert_close(f"{name} on rank {rank}", mine, shard(want), shard(torch_result), ranks=ranks)
    replicated = {("column", False): actual[1], ("row", False): actual[0]}.get(
        (kind, sequence_parallel), torch.zeros(0)
    )
    return replicated, actual[3] if kind == "row" else torch.zeros(0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_output_and_every_gradient(ranks):
    forms = [(0, False, False), (1, True, True), (0, False, 3), (1, True, 2)]
    dtypes = torch.float32, torch.bfloat16
    cases = [
        (kind, sequence_parallel, sequence_dim, dtype, skip_bias_add, overlap)
        for kind, sequence_parallel, dtype in itertools.product(["column", "row"], [False, True], dtypes)
        for sequence_dim, skip_bias_add, overlap in forms
    ]
    for case, results in zip(cases, run_cases_on_ranks(layer_case, ranks, cases), strict=True):
        for result in results[1:]:  # replicated tensors are bitwise the same
            assert all(torch.equal(mine, first) for mine, first in zip(result, results[0], strict=True)), case


def collectives_of(rank, ranks):
    group, seen = dist.group.WORLD, {}
    for sequence_parallel in (False, True):
        options = {"tp_group": group, "sequence_parallel": sequence_parallel, "overlap": False}
        up, down = ColumnParallelLinear(8, 16, **options), RowParallelLinear(16, 8, **options)
        x = torch.randn(4, 3, 8, requires_grad=True)
        with record_communication() as forward:
            y = down(up(x))
        with record_communication() as backward:
            y.sum().backward()
        seen[sequence_parallel] = forward.order, backward.order
        up.weight.requires_grad_(False)
        with record_communication() as frozen:
            up(x).sum().backward()
        up.weight.requires_grad_(True)
        with record_communication() as no_dx:
            up(x.detach()).sum().backward()
        seen[sequence_parallel, "less"] = frozen.order, no_dx.order
    return seen


def test_number_and_order_of_collectives():
    for seen in run_on_ranks(collectives_of, 2):
        # One all-reduce forward and one backward for the pair of layers; the latter before the last product.
        assert seen[False] == (["mm", "mm", "all_reduce"], ["mm", "mm", "mm", "all_reduce", "mm"])
        assert seen[True] == (
            ["all_gather", "mm", "mm", "reduce_scatter"],
            ["all_gather", "mm", "mm", "all_gather", "mm", "reduce_scatter", "mm"],
        )
        assert seen[False, "less"] == (["mm", "mm", "all_reduce"], ["mm", "mm"])
        assert seen[True, "less"] == (
            ["all_gather", "mm", "mm", "reduce_scatter"],
            ["all_gather", "mm", "all_gather", "mm"],
        )


def chunked(rank, ranks, overlap):
    """Run a pair of layers; return the order of its work, and all results."""
    results = {}
    for sequence_parallel in (False, True):
        options = {"tp_group": dist.group.WORLD, "sequence_parallel": sequence_parallel, "overlap": overlap}
        torch.manual_seed(1)
        up, down = ColumnParallelLinear(8, 16, **options), RowParallelLinear(16, 8, **options)
        x = torch.randn(10, 3, 8, requires_grad=True)
        with record_communication() as forward:
            y = down(up(x))
        with record_communication() as backward:
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
        gradients = [p.grad for layer in (up, down) for p in layer.parameters()]
        results[sequence_parallel] = (forward.order, backward.order), [y.detach(), x.grad, *gradients]
    return results


def test_chunks_change_the_order_of_work_and_no_bit():
    plain, cut_in_two = run_cases_on_ranks(chunked, 2, [(False,), (2,)])
    for rank in range(2):
        for sequence_parallel in (False, True):
            values = zip(plain[rank][sequence_parallel][1], cut_in_two[rank][sequence_parallel][1], strict=True)
            assert all(torch.equal(a, b) for a, b in values)
        assert cut_in_two[rank][False][0] == (
            ["mm", "mm", "all_reduce", "mm", "all_reduce"],
            ["mm", "mm", "mm", "all_reduce", "mm", "all_reduce", "mm"],
        )
        assert cut_in_two[rank][True][0] == (
            # The own block under the first chunk, then the other rank's. Chunks of the scatter are of both ranks.
            ["all_gather"] * 2 + ["mm"] * 3 + ["mm", "mm", "reduce_scatter"] * 2,
            ["all_gather"] * 2 + ["mm"] * 3 + ["mm", "all_gather"] + ["mm", "mm", "reduce_scatter"] * 2 + ["mm"],
        )


def measured(rank, ranks):
    """Count the collectives of a layer's construction, of a second one, and of a step; return the costs, too."""
    with record_communication() as made:
        layer = ColumnParallelLinear(8, 16, tp_group=dist.group.WORLD)
    with record_communication() as again:
        ColumnParallelLinear(8, 16, tp_group=dist.group.WORLD)
    x = torch.randn(4, 8, requires_grad=True)
    with record_communication() as step:
        layer(x).sum().backward()
    return made.counts["all_reduce"] > 0, again.counts, step.counts, overlap_costs(layer.tp_group, x.dtype, x.device)


def test_the_group_is_measured_once():
    first, second = run_on_ranks(measured, 2)
    assert first == second and first[:3] == (True, {}, {"all_reduce": 1})


class _Signals(record_communication):
    """Recorder that runs steps[i] before the i-th product."""

    def __init__(self, steps):
        super().__init__()
        self.steps = iter(steps)

    def at_product(self):
        next(self.steps)()


def overlap(rank, ranks, sequence_parallel):
    """Let rank 1 join a collective only after rank 0 has begun the product that hides it: without overlap it hangs."""
    store = dist.distributed_c10d._get_default_store()
    for_dx, for_dw = f"{sequence_parallel}: product for dx", f"{sequence_parallel}: product for dw"
    layer = ColumnParallelLinear(8, 16, tp_group=dist.group.WORLD, sequence_parallel=sequence_parallel, overlap=False)
    x = torch.randn(4, 3, 8, requires_grad=True)
    y = layer(x)
    nothing = lambda: None  # noqa: E731
    if rank == 0:
        steps = [lambda: store.set(for_dx, "1"), lambda: store.set(for_dw, "1")]
    elif sequence_parallel:
        store.wait([for_dx])  # the gather has not run, since this rank is not in it
        steps = [lambda: store.wait([for_dw]), nothing]  # nor the reduce-scatter
    else:
        steps = [lambda: store.wait([for_dw]), nothing]
    with _Signals(steps):
        y.sum().backward()
    return layer.weight.grad is not None and x.grad is not None


def test_backward_hides_its_collectives():
    assert run_cases_on_ranks(overlap, 2, [(False,), (True,)]) == [[True, True]] * 2


def whole_at_both_ends(rank, ranks):
    """Use gather_output and input_is_parallel=False: drop-ins for nn.Linear with replicated input and output."""
    group = dist.group.WORLD
    torch.manual_seed(3)
    column = ColumnParallelLinear(IN, OUT, tp_group=group, gather_output=True, init_std=1.0)
    row = RowParallelLinear(OUT, IN, tp_group=group, input_is_parallel=False, init_std=1.0)
    x = torch.randn(S, IN, requires_grad=True)
    dy = torch.randn(S, IN)
    row(torch.tanh(column(x))).backward(dy)
    weights = torch.empty(OUT, IN), torch.empty(ranks, IN, OUT // ranks)
    dist.all_gather_single(weights[0], column.weight.detach())
    dist.all_gather_single(weights[1].view(-1), row.weight.detach().view(-1))
    w, v = (t.double().requires_grad_() for t in (weights[0], torch.cat(list(weights[1]), dim=1)))
    x64 = x.detach().double().requires_grad_()
    (torch.tanh(x64 @ w.t()) @ v.t()).backward(dy.double())
    assert_close("dx", x.grad, x64.grad)
    assert_close("dw", column.weight.grad, cut(w.grad, 0, rank, ranks))
    assert_close("dv", row.weight.grad, cut(v.grad, 1, rank, ranks))
    assert_close("db", row.bias.grad, dy.double().sum(0))
    return x.grad


def test_whole_input_and_output():
    first, second = run_on_ranks(whole_at_both_ends, 2)
    assert torch.equal(first, second)


def empty_input(rank, ranks):
    for sequence_parallel in (False, True):
        options = {"tp_group": dist.group.WORLD, "sequence_parallel": sequence_parallel}
        up, down = ColumnParallelLinear(8, 16, **options), RowParallelLinear(16, 8, **options)
        x = torch.randn(4, 0, 8, requires_grad=True)
        y = down(up(x))
        y.sum().backward()
        assert y.shape == x.grad.shape == x.shape and torch.equal(up.weight.grad, torch.zeros(16 // ranks, 8))


def test_empty_batch():
    run_on_ranks(empty_input, 2)


def under_autocast(rank, ranks):
    layer = ColumnParallelLinear(IN, OUT, tp_group=dist.group.WORLD)
    x = torch.randn(S, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        same = F.linear(x, layer.weight, layer.bias)
    assert y.dtype == torch.bfloat16 and torch.equal(y, same)
    y.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


def test_autocast():
    run_on_ranks(under_autocast, 2)


def errors(rank, ranks):
    group, found = dist.group.WORLD, []
    ColumnParallelLinear(8, 8, tp_group=group)  # measures the group, once

    def refused(kind, call):
        with pytest.raises(kind) as info, record_communication() as seen:
            call()
        assert not seen.counts, "an error must come before any collective"
        found.append(str(info.value))

    sharded = {"tp_group": group, "sequence_parallel": True}
    refused(InputError, lambda: ColumnParallelLinear(8, 13, tp_group=group))
    refused(InputError, lambda: RowParallelLinear(13, 8, tp_group=group))
    refused(InputError, lambda: ColumnParallelLinear(8, 8, tp_group=group, gather_output=True, skip_bias_add=True))
    refused(InputError, lambda: RowParallelLinear(8, 8, tp_group=group)(torch.zeros(4, 8)))
    refused(InputError, lambda: RowParallelLinear(8, 8, **sharded)(torch.zeros(5, 4)))
    refused(InputError, lambda: RowParallelLinear(8, 8, sequence_dim=1, **sharded)(torch.zeros(4, 4)))
    refused(InputError, lambda: ColumnParallelLinear(8, 8, tp_group=dist.new_group([1 - rank])))
    refused(TypeError, lambda: ColumnParallelLinear(8, 8, tp_group=group)(torch.zeros(4, 8).bfloat16()))
    refused(InputError, lambda: column_parallel_linear(torch.zeros(4, 8), torch.zeros(8), tp_group=group))
    return found


def test_errors_on_every_rank():
    # Each rank must make the groups of the other, too: ranks 0 and 1 call new_group with different members.
    for found in run_on_ranks(errors, 2):
        assert found[0] == "out_features=13 must be divisible by tensor_parallel_size=2 (nearest: 12, 14)"
        assert found[1] == "in_features=13 must be divisible by tensor_parallel_size=2 (nearest: 12, 14)"
        assert "gather_output=True with skip_bias_add=True" in found[2]
        assert "x.shape=(4, 8) must end in this rank's number of input features 4" in found[3]
        assert found[4] == "sequence length x.shape[0]=5 must be divisible by tensor_parallel_size=2 (nearest: 4, 6)"
        assert "sequence_dim=1 must be a dim of x.shape=(4, 4) other than the last" in found[5]
        assert "does not contain this rank" in found[6]
        assert "x.dtype=bfloat16 must equal weight.dtype=float32" in found[7]
        assert "must be (out_features, in_features)" in found[8]


def weights(rank, ranks, kind):
    torch.manual_seed(11)
    group = dist.group.WORLD if ranks > 1 else None
    layer = kind(24, 32, tp_group=group)
    assert not layer.bias.any()
    return layer.weight.detach(), parameter_shard(layer.weight), parameter_shard(layer.bias)


def test_every_size_starts_from_the_same_weight():
    kinds = [(ColumnParallelLinear,), (RowParallelLinear,)]
    whole, *of_sizes = (run_cases_on_ranks(weights, ranks, kinds) for ranks in (1, 2, 4))
    for dim, ((full, *_),) in enumerate(whole):
        assert 0.015 < full.std() < 0.025
        for parts in (of_size[dim] for of_size in of_sizes):
            assert torch.equal(torch.cat([part for part, *_ in parts], dim), full)
            for rank, (part, weight_shard, bias_shard) in enumerate(parts):
                assert weight_shard.full_shape == (32, 24) and not weight_shard.replicated
                assert weight_shard.offset[dim] == rank * part.shape[dim] and weight_shard.offset[1 - dim] == 0
                assert bias_shard.full_shape == (32,) and bias_shard.replicated == (dim == 1)
                assert bias_shard.offset == (rank * part.shape[0] if dim == 0 else 0,)


def copies(rank, ranks):
    layer = ColumnParallelLinear(8, 16, tp_group=dist.group.WORLD)
    twin = copy.deepcopy(torch.nn.Sequential(layer))[0]
    assert twin.tp_group is layer.tp_group and twin.weight is not layer.weight
    assert parameter_shard(twin.weight) == parameter_shard(layer.weight)
    empty = ColumnParallelLinear(8, 16, tp_group=dist.group.WORLD, device="meta").to_empty(device="cpu")
    assert parameter_shard(empty.weight) == parameter_shard(layer.weight)


def test_shards_stay_marked():
    run_on_ranks(copies, 2)


def test_one_rank_is_nn_linear():
    for kind in (ColumnParallelLinear, RowParallelLinear):
        layer, linear = kind(6, 4, tp_group=None, sequence_parallel=True), torch.nn.Linear(6, 4)
        layer.load_state_dict(linear.state_dict())
        x = torch.randn(5, 6)
        assert torch.equal(layer(x), linear(x))


def from_whole(rank, ranks):
    group = dist.group.WORLD if ranks > 1 else None
    torch.manual_seed(4)
    first, second = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8, bias=False)
    second.weight.requires_grad_(False)
    state = torch.get_rng_state()
    up = ColumnParallelLinear.from_linear(first, group)
    down = RowParallelLinear.from_linear(second, group, overlap=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert parameter_shard(up.weight).full_shape == (12, 8) and "overlap=off" in down.extra_repr()
    assert up.weight.requires_grad and not down.weight.requires_grad and down.bias is None
    x = torch.randn(5, 8, requires_grad=True)
    y, wanted = down(up(x)), second(first(x))
    assert_close("y", y.detach(), wanted.detach().double())
    (mine,), (theirs,) = (torch.autograd.grad(t.square().sum(), x) for t in (y, wanted))
    assert_close("dx", mine, theirs.double())
    with pytest.raises(TypeError, match=r"linear=ReLU must be a torch\.nn\.Linear"):
        ColumnParallelLinear.from_linear(torch.nn.ReLU(), group)
    if ranks > 1:
        with pytest.raises(InputError, match=r"out_features=13 must be divisible by .*\(nearest: 12, 14\)"):
            ColumnParallelLinear.from_linear(torch.nn.Linear(8, 13), group)


@pytest.mark.parametrize("ranks", [1, 2])
def test_from_linear(ranks):
    run_on_ranks(from_whole, ranks)
