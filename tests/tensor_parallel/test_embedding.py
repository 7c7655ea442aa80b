"""Start here when the vocab-parallel embedding looks up the wrong rows, or loses gradients."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.sharding import update_record
from fused_megatron.tensor_parallel import VocabParallelEmbedding, parameter_shard
from fused_megatron.testing import assert_close, run_cases_on_ranks, run_on_ranks

# For bfloat16 the gradient without a main_grad is rounded to it.
RTOL = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
V, H, S, B = 101, 12, 8, 40  # an odd vocabulary; each id comes up several times


def embedding_case(rank, ranks, sequence_parallel, sequence_dim, dtype, ids_dtype):
    group = dist.group.WORLD if ranks > 1 else None
    torch.manual_seed(9)
    layer = VocabParallelEmbedding(
        V, H, tp_group=group, sequence_parallel=sequence_parallel, sequence_dim=sequence_dim, pad_to_multiple_of=8,
        init_std=1.0, dtype=dtype,
    )  # fmt: skip
    rows = layer.padded_num_embeddings // ranks
    assert layer.padded_num_embeddings == 104 and layer.weight.shape == (rows, H)
    parts = [torch.empty_like(layer.weight) for _ in range(ranks)]
    if ranks > 1:
        dist.all_gather(parts, layer.weight.detach())
    else:
        parts = [layer.weight.detach()]
    full = torch.cat(parts)
    assert not full[V:].any() and full[:V].std() > 0.9
    shape = (S, B) if sequence_dim == 0 else (B, S)
    ids, dy = torch.randint(0, V, shape, dtype=ids_dtype), torch.randn(*shape, H).to(dtype)
    ids[0, 0], ids[-1, -1] = 0, V - 1

    def by_torch(dtype):
        w = full.to(dtype).requires_grad_()
        y = F.embedding(ids, w)
        return y.detach(), torch.autograd.grad(y, w, dy.to(dtype))[0]

    own = (lambda t: t.chunk(ranks, sequence_dim)[rank]) if sequence_parallel else (lambda t: t)
    ids_before = ids.clone()
    with record_communication() as forward:
        y = layer(ids)
    with record_communication() as backward:
        y.backward(own(dy))
    if ranks == 1:
        expected = {}, {}
    else:
        expected = ({"reduce_scatter": 1}, {"all_gather": 1}) if sequence_parallel else ({"all_reduce": 1}, {})
    assert (forward.counts, backward.counts) == expected
    assert torch.equal(ids, ids_before) and torch.equal(y, own(by_torch(dtype)[0]))
    mine = slice(rank * rows, (rank + 1) * rows)
    assert_close("dw", layer.weight.grad, by_torch(torch.float64)[1][mine], by_torch(dtype)[1][mine])
    shard = parameter_shard(layer.weight)
    assert shard.full_shape == (V, H) and shard.offset == (rank * rows, 0) and not shard.replicated
    return y.detach(), layer.weight.detach()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_values_and_gradients(ranks):
    cases = [
        (sequence_parallel, sequence_dim, dtype, ids_dtype)
        for sequence_parallel in (False, True)[:ranks]
        for dtype in (torch.float32, torch.bfloat16)
        for sequence_dim, ids_dtype in [(0, torch.int64), (1, torch.int32)]
    ]
    for case, results in zip(cases, run_cases_on_ranks(embedding_case, ranks, cases), strict=True):
        sequence_parallel, *_ = case
        if not sequence_parallel:
            assert all(torch.equal(y, results[0][0]) for y, _ in results), case


def full_weight(rank, ranks):
    torch.manual_seed(4)
    return VocabParallelEmbedding(V, H, tp_group=dist.group.WORLD if ranks > 1 else None).weight.detach()


def test_every_size_starts_from_the_same_table():
    (whole,) = run_on_ranks(full_weight, 1)
    assert whole.shape[0] == 128
    for ranks in (2, 3, 4):
        parts = torch.cat(run_on_ranks(full_weight, ranks))
        assert parts.shape[0] == {2: 128, 3: 384, 4: 128}[ranks]
        assert torch.equal(parts[:V], whole[:V]) and not parts[V:].any()


def errors(rank, ranks):
    group, found = dist.group.WORLD, []
    layer = VocabParallelEmbedding(V, H, tp_group=group, sequence_parallel=True)
    for ids in (torch.tensor([[0, 1], [V, 2]]), torch.tensor([[-1]]), torch.zeros(5, 2, dtype=torch.int64)):
        with pytest.raises(InputError) as info, record_communication() as seen:
            layer(ids)
        assert not seen.counts
        found.append(str(info.value))
    with pytest.raises(TypeError, match=r"ids.dtype=float32 must be one of: int64, int32"):
        layer(torch.zeros(4, 2))
    with pytest.raises(InputError, match="pad_to_multiple_of=0"):
        VocabParallelEmbedding(V, H, tp_group=group, pad_to_multiple_of=0)
    return found


def test_errors_on_every_rank():
    for found in run_on_ranks(errors, 2):
        assert found == [
            "ids[1, 0]=101 must be in [0, 101), the size of the vocabulary",
            "ids[0, 0]=-1 must be in [0, 101), the size of the vocabulary",
            "sequence length ids.shape[0]=5 must be divisible by tensor_parallel_size=2 (nearest: 4, 6)",
        ]


def frozen(rank, ranks):
    layer = VocabParallelEmbedding(V, H, tp_group=dist.group.WORLD).requires_grad_(False)
    assert not layer(torch.tensor([1, 2])).requires_grad
    assert layer(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, H)


def test_frozen_and_empty():
    run_on_ranks(frozen, 2)


def into_main_grad(rank, ranks, sequence_parallel, dtype):
    torch.manual_seed(6)
    layer = VocabParallelEmbedding(V, H, tp_group=dist.group.WORLD, sequence_parallel=sequence_parallel, dtype=dtype)
    twin = copy.deepcopy(layer)
    main_grad = torch.randn(layer.weight.shape)
    update_record(layer.weight, main_grad=lambda: main_grad)
    wanted = main_grad.clone()
    ids = torch.randint(0, V, (6, 5))
    ids[4:] = ids[:2]  # repeated
    y = layer(ids)
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy)
    twin(ids).backward(dy)
    assert layer.weight.grad is None
    torch.testing.assert_close(main_grad, wanted + twin.weight.grad, rtol=RTOL[dtype], atol=RTOL[dtype])
    padding = max(0, (rank + 1) * len(wanted) - V)
    assert torch.equal(main_grad[-padding:], wanted[-padding:]) or not padding


def test_gradient_goes_into_main_grad():
    run_cases_on_ranks(into_main_grad, 2, itertools.product([False, True], [torch.float32, torch.bfloat16]))
