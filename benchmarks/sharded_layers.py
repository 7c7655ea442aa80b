"""The layers of layers.py: ours and DTensor's from the same weights, and their exact results."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from gpt_of_ours import load
from gpt_of_torch import PlainAttention, PlainMLP
from steps_on_ranks import Candidate, WrongResult, measure, start_rank
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import parallel as tp

from fused_megatron.benchmarking.exact_results import INEXACT
from fused_megatron.benchmarking.side_by_side import OURS
from fused_megatron.config import GPTConfig
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models import ParallelMLP, ParallelSelfAttention
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.testing.sharded_models import gradient_errors

RANKS = 2
CAUSAL = AttentionMask(causal=True)
WITHOUT_OVERLAP, DTENSOR = "ours without overlap", "DTensor"
WAYS = [OURS, WITHOUT_OVERLAP, DTENSOR]


@dataclass(frozen=True)
class Layer:
    """One comparison. Activations are [S, B, H]; only torch's attention takes [B, S, H]."""

    kind: str
    seq_len: int
    batch: int
    hidden_size: int
    num_heads: int
    sequence_parallel: bool
    backward: bool

    @property
    def op(self) -> str:
        return f"{self.kind} forward{' + backward' * self.backward}"

    @property
    def label(self) -> str:
        sizes = f"[{self.seq_len}, {self.batch}, {self.hidden_size}]"
        return f"{sizes} tp={RANKS}{' + sp' * self.sequence_parallel}"

    @property
    def flops(self) -> int:
        """Return the FLOPs of matrix products, without savings by the causal mask; a backward is two forwards."""
        hidden, tokens = self.hidden_size, self.seq_len * self.batch
        attention = 8 * hidden**2 + 4 * self.seq_len * hidden
        return tokens * (16 * hidden**2 if self.kind == "MLP" else attention) * (3 if self.backward else 1)

    def plain(self) -> nn.Module:
        """Build the whole layer, with the same weights on every rank."""
        torch.manual_seed(3)
        if self.kind == "MLP":
            return PlainMLP(self.hidden_size)
        return PlainAttention(self.hidden_size, self.num_heads)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the full input and the full upstream gradient."""
        generator = torch.Generator().manual_seed(4)
        x, dy = torch.randn(2, self.seq_len, self.batch, self.hidden_size, generator=generator)
        return x, dy


@dataclass
class Right:
    """Results of the whole layer in float64, rounded to float32, by the names of the weights, "x" and "y"."""

    layer: Layer

    def __post_init__(self) -> None:
        model, (x, dy) = self.layer.plain().double(), (t.double() for t in self.layer.tensors())
        x.requires_grad_()
        y = by_sequence(model, self.layer, x)
        y.backward(dy)
        self.gradients = {name: p.grad.float() for name, p in model.named_parameters()}
        self.y, self.dx = y.detach().float(), x.grad.float()

    def check(self, y: torch.Tensor, dx: torch.Tensor, errors: dict[str, float]) -> None:
        """Check this rank's result, its input gradient, and the errors of its weight gradients."""
        got = {"the result": (y, self.y), "the gradient of the input": (dx, self.dx)}
        for name, (mine, whole) in got.items():
            wanted = own_block(whole, self.layer)
            errors[name] = float((mine - wanted).norm() / wanted.norm()) if mine.shape == wanted.shape else 1.0
        name = max(errors, key=lambda name: errors[name])
        if not errors[name] <= INEXACT[torch.float32]:
            raise WrongResult(f"{name} is {errors[name]:.1e} off")


def by_sequence(model: nn.Module, layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Call a torch module on [S, B, H]; attention takes [B, S, H]."""
    return model(x) if layer.kind == "MLP" else model(x.transpose(0, 1)).transpose(0, 1)


def own_block(whole: torch.Tensor, layer: Layer) -> torch.Tensor:
    return whole.chunk(RANKS)[dist.get_rank()] if layer.sequence_parallel else whole


def candidate(model: Callable[[torch.Tensor], torch.Tensor], layer: Layer, right: Right, errors_of: Any) -> Candidate:
    """Check a layer and return its timed step."""
    x, dy = (own_block(t, layer).clone() for t in layer.tensors())
    x.requires_grad_()
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []

    def forward_backward() -> torch.Tensor:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        y = model(x)
        y.backward(dy)
        arrived(x.grad)
        return arrived(y.detach())

    def forward() -> None:
        with torch.no_grad():
            arrived(model(x))

    y = forward_backward()
    right.check(y, arrived(x.grad), errors_of())
    return Candidate(forward_backward if layer.backward else forward)


def arrived(x: Any) -> torch.Tensor:
    """Wait for DTensor's collectives, which may still be in flight."""
    return x.wait() if isinstance(x, AsyncCollectiveTensor) else x


def ours(layer: Layer, right: Right, overlap: bool) -> Candidate:
    config = GPTConfig(hidden_size=layer.hidden_size, num_heads=layer.num_heads)
    sharded = ParallelLayout(dist.group.WORLD, layer.sequence_parallel, overlap)
    model: nn.Module
    if layer.kind == "MLP":
        model = ParallelMLP(config, layout=sharded)
    else:
        model = CausalAttention(config, layout=sharded)
    load(dict(model.named_parameters()), dict(layer.plain().named_parameters()))
    return candidate(model, layer, right, lambda: gradient_errors(model, right.gradients.__getitem__))


class CausalAttention(ParallelSelfAttention):
    """Our attention, called with only the input, like torch's layers."""

    def forward(self, x: torch.Tensor, mask: AttentionMask = CAUSAL, **options: Any) -> Any:
        return super().forward(x, mask, **options)


class BySequence(nn.Module):
    """A torch layer with the input and output layout of ours."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer, self.whole = layer, layer.plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return by_sequence(self.whole, self.layer, x)


def dtensor(layer: Layer, right: Right) -> Candidate:
    model = BySequence(layer)
    between: Any = Replicate()
    if layer.sequence_parallel:
        between = Shard(0 if layer.kind == "MLP" else 1)
    first, last = ("expansion" if layer.kind == "MLP" else "query_key_value"), "projection"
    plan = {
        f"whole.{first}": tp.ColwiseParallel(input_layouts=between),
        f"whole.{last}": tp.RowwiseParallel(output_layouts=between),
    }
    tp.parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan)

    def errors() -> dict[str, float]:
        found = {}
        for name, parameter in model.whole.named_parameters():
            gradient: Any = parameter.grad
            full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            wanted = right.gradients[name]
            found[name] = float((full - wanted).abs().max() / wanted.abs().max())
        return found

    return candidate(model, layer, right, errors)


def on_rank(
    rank: int, world_size: int, journal: str, names: list[str], layer: Layer, threads: int, rounds: int
) -> None:
    start_rank(threads)
    right = Right(layer)
    ways: dict[str, Callable[[], Candidate]] = {
        OURS: lambda: ours(layer, right, True),
        WITHOUT_OVERLAP: lambda: ours(layer, right, False),
        DTENSOR: lambda: dtensor(layer, right),
    }
    measure(rank, world_size, journal, {name: ways[name] for name in names}, rounds)
