"""Start here when gradients over data-parallel ranks are wrong, or buckets are sent late or in different orders."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fused_megatron.config import GPTConfig
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.mesh import init_mesh
from fused_megatron.models import GPT
from fused_megatron.sharding import Replicas
from fused_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear, parallel_mlp
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks, run_on_ranks


class Chain(nn.Module):
    """Model of four linear layers, one of which is used twice, and one that is not used."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(7, 7, dtype=dtype) for _ in range(4))
        self.unused = nn.Linear(3, 3, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in [*self.layers, self.layers[0]]:
            x = torch.tanh(layer(x))
        return x


def inputs(rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(5, 7, generator=generator).to(dtype) for _ in range(3)]


def reduced(rank: int, world_size: int, dtype: torch.dtype, bucket_bytes: float) -> dict[str, torch.Tensor]:
    model = Chain(dtype)
    buckets = GradientBuckets(
        list(model.parameters()), Replicas.of_copies(dist.group.WORLD if world_size > 1 else None), bucket_bytes
    )
    for _ in range(2):  # a second step starts from zero
        buckets.zero_()
        buckets.reduce_after_backwards(3)
        for x in inputs(rank, dtype):
            model(x).square().sum().backward()
        buckets.finish()
    return {name: buckets[p].clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("world_size", [1, 3])
def test_sum_over_ranks_and_microbatches(world_size: int) -> None:
    expected = Chain(torch.float64)
    expected.load_state_dict(Chain(torch.float32).state_dict())
    for rank in range(world_size):
        for x in inputs(rank, torch.float32):
            expected(x.double()).square().sum().backward()
    # A bucket for each parameter, for some, for all.
    cases = [(torch.float32, bucket_bytes) for bucket_bytes in (1, 300, 1e6)]
    for case, by_rank in zip(cases, run_cases_on_ranks(reduced, world_size, cases), strict=True):
        for gradients in by_rank:
            for name, p in expected.named_parameters():
                wanted = torch.zeros_like(p) if p.grad is None else p.grad
                found = gradients[name].double()
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=f"{name} of {case}")


def test_low_precision_gradients_accumulate_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    buckets = GradientBuckets([model.weight], Replicas())
    for value in (256.0, 1.0, 1.0):  # in bfloat16 256 + 1 = 256
        model(torch.tensor([[value]], dtype=torch.bfloat16)).sum().backward()
    assert model.weight.grad is None
    assert buckets[model.weight].item() == 258.0


class ParallelChain(nn.Module):
    """Model of layers that add to main_grad: column and row, one used twice, a tied weight, an MLP as one function."""

    def __init__(self, dtype: torch.dtype, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"tp_group": group, "dtype": dtype, "init_std": 0.3, "overlap": 2}
        self.up, self.down = ColumnParallelLinear(6, 8, **options), RowParallelLinear(8, 6, **options)
        self.mlp_up, self.mlp_down = ColumnParallelLinear(6, 8, **options), RowParallelLinear(8, 6, **options)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(torch.tanh(self.up(x)))
        x = self.down(torch.tanh(self.up(x)))
        up, down = self.mlp_up, self.mlp_down
        x = parallel_mlp(x, up.weight, up.bias, down.weight, down.bias, tp_group=self.group, overlap=2)
        # An ordinary use of a weight, for autograd.
        return x @ self.mlp_down.weight.sum(1, keepdim=True)


def into_main_grad(rank: int, world_size: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    mesh = init_mesh(tensor_parallel_size=2)
    apart = ParallelChain(dtype, mesh.tp_group)
    model = ParallelChain(dtype, mesh.tp_group)
    buckets = GradientBuckets(list(model.parameters()), Replicas.of_copies(mesh.dp_group), 1)
    sums = [torch.zeros(p.shape) for p in apart.parameters()]
    for i in range(3):
        x = torch.randn(10, 6, generator=torch.Generator().manual_seed(10 * i + mesh.dp_rank)).to(dtype)
        if i == 2:
            buckets.reduce_after_backwards(1)
        model(x).square().sum().backward()
        assert dtype == torch.float32 or all(p.grad is None for p in model.parameters())
        apart.zero_grad()
        apart(x).square().sum().backward()
        for total, p in zip(sums, apart.parameters(), strict=True):
            total += p.grad
    (queue,) = buckets._queues
    assert len(queue._under_way) == len(queue.buckets)  # all were sent during backward
    buckets.finish()
    for total in sums:
        dist.all_reduce(total, group=mesh.dp_group)
    return [(buckets[p].clone(), total) for p, total in zip(model.parameters(), sums, strict=True)]


def test_linear_layers_add_to_the_buckets() -> None:
    # For bfloat16 each microbatch is rounded to it without main_grad.
    tolerances = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
    found = run_cases_on_ranks(into_main_grad, 4, [(dtype,) for dtype in tolerances])
    for tolerance, by_rank in zip(tolerances.values(), found, strict=True):
        for mine, wanted in [pair for pairs in by_rank for pair in pairs]:
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def test_products_of_low_precision_are_not_rounded() -> None:
    torch.manual_seed(0)
    layer = ColumnParallelLinear(5, 3, tp_group=None, dtype=torch.bfloat16)
    buckets = GradientBuckets(list(layer.parameters()), Replicas())
    x, dy = (torch.randn(64, n).bfloat16() for n in (5, 3))
    for _ in range(2):
        layer(x).backward(dy)
    assert layer.weight.grad is None
    torch.testing.assert_close(buckets[layer.weight], 2 * dy.float().t() @ x.float(), rtol=1e-6, atol=1e-5)


def test_no_tensor_of_the_gradients_size_is_made() -> None:
    layer = ColumnParallelLinear(512, 1024, tp_group=None)
    buckets = GradientBuckets(list(layer.parameters()), Replicas())
    y = layer(torch.zeros(4, 512))
    with torch.profiler.profile(profile_memory=True) as profile:
        y.backward(torch.zeros(4, 1024))
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 4 * layer.weight.numel() and buckets[layer.weight].shape == (1024, 512)


def order_of_sends(rank: int, world_size: int) -> tuple[list[int], list[int]]:
    model = Chain(torch.float32)
    buckets = GradientBuckets(list(model.parameters()), Replicas.of_copies(dist.group.WORLD), 1)
    sizes: list[int] = []
    original = dist.all_reduce

    def recording(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)  # type: ignore[arg-type]

    dist.all_reduce = recording  # type: ignore[assignment]
    buckets.reduce_after_backwards(1)
    during: list[int] = []
    x = inputs(rank, torch.float32)[0].requires_grad_()
    x.register_hook(lambda _: during.extend(sizes))  # the last thing that backward does
    # The ranks use the layers in different orders, and must send the same buckets.
    for layer in [*model.layers][:: 1 if rank == 0 else -1]:
        x = layer(x)
    (x.sum() + model.unused(x[:, :3]).sum()).backward()
    buckets.finish()
    return during, sizes


def test_buckets_leave_during_backward_and_in_one_order_on_every_rank() -> None:
    (during, first), (_, second) = run_on_ranks(order_of_sends, 2)
    # 3 and 9, 7 and 49 elements with their padding.
    assert first == second and sorted(first) == sorted([8, 16] + [8, 56] * 4)
    assert len(during) >= len(first) - 2


def stages_apart(rank: int, world_size: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Reduce two stages that share a weight; return the sizes that each call sent, and the sums."""
    torch.manual_seed(0)
    first, second, tied = (nn.Parameter(torch.randn(n)) for n in (2, 11, 17))
    buckets = GradientBuckets({0: [tied, first], 4: [second, tied]}, Replicas.of_copies(dist.group.WORLD), 1)
    sent: list[list[int]] = []
    original = dist.all_reduce

    def recording(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        sent[-1].append(tensor.numel())
        return original(tensor, *args, **kwargs)  # type: ignore[arg-type]

    dist.all_reduce = recording  # type: ignore[assignment]
    for _ in range(2):  # a second step begins again
        buckets.zero_()
        buckets.reduce_after_backwards(2)
        for microbatch in range(2):
            scale = 1.0 + rank + 10 * microbatch
            for loss in ((tied * second.sum()).sum(), (tied * first.sum()).sum()):
                sent.append([])
                (loss * scale).backward()
        waits = []
        for stage in (4, 0):
            sent.append([])
            waits.append(buckets.reduce(stage))
        for wait in waits:
            wait()
    scales = sum(1.0 + r + 10 * m for r in range(world_size) for m in range(2))
    wanted = [tied.sum() * scales, tied.sum() * scales, (first.sum() + second.sum()) * scales]
    for parameter, value in zip((first, second, tied), wanted, strict=True):
        torch.testing.assert_close(buckets[parameter], value.expand_as(parameter), rtol=1e-6, atol=1e-6)
    return sent, [buckets[p] for p in (first, second, tied)]


def test_a_weight_of_two_stages_is_sent_once_and_last() -> None:
    ranks = run_on_ranks(stages_apart, 2)
    for sent, _ in ranks:
        # Four backwards, of which the last two fill a stage each; the shared weight waits for both stages.
        assert sent == 2 * [[], [], [16], [8], [], [24]]
    assert all(torch.equal(a, b) for a, b in zip(ranks[0][1], ranks[1][1], strict=True))


MASKED = GPTConfig(num_layers=1, hidden_size=16, num_heads=2, seq_len=8, vocab_size=40, pad_vocab_size_to_multiple_of=8)


def masked_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return 4 sequences: in the first two, of data-parallel rank 0, one token counts; in the others all tokens do."""
    ids = torch.randint(40, (4, 9), generator=torch.Generator().manual_seed(3))
    target = ids[:, 1:].clone()
    target[:2] = -100
    target[0, 5] = 7
    return ids[:, :-1], target


def uneven_masks(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    mesh = init_mesh(tensor_parallel_size=2)
    model = GPT(MASKED, layout=mesh.layout(sequence_parallel=True))
    buckets = GradientBuckets(list(model.parameters()), Replicas.of_copies(mesh.dp_group), 1000)
    tokens, target = (part.chunk(mesh.dp_size)[mesh.dp_rank] for part in masked_batch())
    num_tokens = int((masked_batch()[1] != -100).sum())  # of all ranks
    buckets.reduce_after_backwards(1)
    (model(tokens, target, reduction="sum") / num_tokens).backward()
    buckets.finish()
    norms = {name: buckets[p].clone() for name, p in model.named_parameters() if "norm" in name}
    return norms | {"table": buckets[model.token_embedding.weight].clone()}


def test_uneven_masks_count_every_token_equally() -> None:
    model = GPT(MASKED)
    tokens, target = masked_batch()
    logits = model(tokens)[..., :40].flatten(0, 1)
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad(F.cross_entropy(logits, target.flatten()), list(parameters.values()))
    gradients = dict(zip(parameters, wanted, strict=True))
    ranks = run_on_ranks(uneven_masks, 4)
    for tp_rank, found in enumerate(ranks):
        table = gradients["token_embedding.weight"].chunk(2)[tp_rank % 2]
        torch.testing.assert_close(found.pop("table"), table, rtol=1e-4, atol=1e-7)
        assert "final_norm.weight" in found
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-7, msg=name)
            assert torch.equal(gradient, ranks[0][name])
