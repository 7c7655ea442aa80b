"""A mixture-of-experts layer against its matrix products only, other libraries, and itself on two ranks.

    make bench-experts
    python benchmarks/experts.py --tokens 2048 --experts 64 --selected 8 --rounds 9

One rank: forward and backward of the whole layer (router, permutation, experts, combination), float32, SwiGLU without
biases. "products only" multiplies the same matrices with the same numbers of rows, one expert after the other, into
buffers that exist: no layer can be faster. Hugging Face's Qwen3-MoE block has the same weights, once with its plain
loop and once with torch's grouped_mm. A provider whose result or gradients differ from a float64 computation gets one
line and no figure.

Movement: router scores, order, permutation and combination, forward and backward, against copies of their bytes.

Two ranks: ExpertMLP on two gloo ranks of one thread each, for each kind of routes (testing/drawn_routes.py), over one
rank of one thread with all experts and the tokens of one rank. 1 would be perfect scaling.

In every round each provider runs once, in an order that rotates by one; the times are medians, the ratios medians of
the ratios within a round.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.benchmarking.report.measured_tables import MeasuredTables
from fused_megatron.checks import first_line
from fused_megatron.config import GPTConfig
from fused_megatron.expert_parallel import ExpertMLP
from fused_megatron.kept_pages import keep_malloc_pages
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models.mixture_of_experts import MixtureOfExperts
from fused_megatron.modules.auxiliary_loss import split_auxiliary_loss
from fused_megatron.ops.expert_permutation import combine_tokens, order_by_expert, permute_tokens
from fused_megatron.ops.expert_routing import RoutingRule, route_tokens
from fused_megatron.testing import run_cases_on_ranks
from fused_megatron.testing.drawn_routes import ROUTINGS, draw_routes

OURS, PRODUCTS = "fused-megatron", "products only"
DOCS = Path(__file__).resolve().parents[1] / "docs"
Step = Callable[[], list[torch.Tensor]]


class Sizes:
    """Sizes of the layer, and tensors of a seed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tokens, self.experts, self.selected = options.tokens, options.experts, options.selected
        self.hidden, self.ffn = options.hidden, options.ffn
        generator = torch.Generator().manual_seed(1)

        def drawn(*shape: int, std: float = 1.0) -> torch.Tensor:
            return std * torch.randn(shape, generator=generator)

        self.x, self.grad = drawn(self.tokens, self.hidden), drawn(self.tokens, self.hidden)
        self.router = drawn(self.experts, self.hidden, std=0.05)
        self.expansion = drawn(self.experts, 2 * self.ffn, self.hidden, std=0.05)
        self.projection = drawn(self.experts, self.hidden, self.ffn, std=0.05)

    def config(self) -> GPTConfig:
        return GPTConfig(
            hidden_size=self.hidden,
            num_heads=1,
            activation="swiglu",
            linear_biases=False,
            num_experts=self.experts,
            experts_per_token=self.selected,
            expert_ffn_hidden_size=self.ffn,
            vocab_size=8,
        )


def reference(sizes: Sizes) -> list[torch.Tensor]:
    """Return the result and the gradients of x, router, expansion and projection in float64."""
    leaves = [t.double().requires_grad_() for t in (sizes.x, sizes.router, sizes.expansion, sizes.projection)]
    x, router, expansion, projection = leaves
    weights, experts = (x @ router.T).softmax(-1).topk(sizes.selected)
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for expert in range(sizes.experts):
        rows, place = torch.where(experts == expert)
        gate, up = (x[rows] @ expansion[expert].T).chunk(2, -1)
        each = (torch.nn.functional.silu(gate) * up) @ projection[expert].T
        y = y.index_add(0, rows, each * weights[rows, place, None])
    return [y.detach(), *torch.autograd.grad(y, leaves, sizes.grad.double())]


def step_of(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], sizes: Sizes, names: list[str]) -> Step:
    x = sizes.x.clone().requires_grad_()
    parameters = [module.get_parameter(name) for name in names]

    def step() -> list[torch.Tensor]:
        for leaf in (x, *parameters):
            leaf.grad = None
        y = forward(x)
        y.backward(sizes.grad)
        return [y.detach(), *(leaf.grad for leaf in (x, *parameters) if leaf.grad is not None)]

    return step


def ours(sizes: Sizes) -> Step:
    layer = MixtureOfExperts(sizes.config(), layout=ParallelLayout())
    names = ["router.weight", "experts.expansion_weight", "experts.projection_weight"]
    with torch.no_grad():
        for name, value in zip(names, (sizes.router, sizes.expansion, sizes.projection), strict=True):
            layer.get_parameter(name).copy_(value.view(layer.get_parameter(name).shape))

    def forward(x: torch.Tensor) -> torch.Tensor:
        (y, _), _ = split_auxiliary_loss(layer(x.unsqueeze(1)))
        return y.view_as(x)

    return step_of(layer, forward, sizes, names)


def of_hugging_face(sizes: Sizes, implementation: str) -> Step:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import (  # noqa: PLC0415
        Qwen3MoeConfig,
        Qwen3MoeSparseMoeBlock,
    )

    config = Qwen3MoeConfig(
        hidden_size=sizes.hidden,
        moe_intermediate_size=sizes.ffn,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.selected,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(config)
    names = ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]
    with torch.no_grad():
        for name, value in zip(names, (sizes.router, sizes.expansion, sizes.projection), strict=True):
            block.get_parameter(name).copy_(value)
    return step_of(block, lambda x: block(x.unsqueeze(0))[0], sizes, names)


def products_only(sizes: Sizes) -> Step:
    """Return a step of the products of all experts: two forward and four backward each, into buffers that exist."""
    scores = sizes.x @ sizes.router.T
    counts = torch.bincount(scores.topk(sizes.selected).indices.flatten(), minlength=sizes.experts).tolist()
    rows = sum(counts)
    x, dx, dy, y = (torch.randn(rows, sizes.hidden) for _ in range(4))
    h, dh = (torch.randn(rows, 2 * sizes.ffn) for _ in range(2))
    a, da = (torch.randn(rows, sizes.ffn) for _ in range(2))
    expansion, projection = sizes.expansion, sizes.projection
    grad_expansion, grad_projection = torch.empty_like(expansion), torch.empty_like(projection)
    logits, grad_router = torch.empty(sizes.tokens, sizes.experts), torch.empty_like(sizes.router)
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    parts = [slice(begin, end) for begin, end in itertools.pairwise(ends)]

    def step() -> list[torch.Tensor]:
        torch.mm(sizes.x, sizes.router.T, out=logits)
        for e, part in enumerate(parts):
            torch.mm(x[part], expansion[e].T, out=h[part])
            torch.mm(a[part], projection[e].T, out=y[part])
        for e, part in enumerate(parts):
            torch.mm(dy[part], projection[e], out=da[part])
            torch.mm(dy[part].T, a[part], out=grad_projection[e])
            torch.mm(dh[part], expansion[e], out=dx[part])
            torch.mm(dh[part].T, x[part], out=grad_expansion[e])
        torch.mm(logits.T, sizes.x, out=grad_router)
        torch.mm(logits, sizes.router)
        return []

    return step


def seconds_of_rounds(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every provider in every round; a first round warms up."""
    names, seconds = list(steps), {name: list[float]() for name in steps}
    for index in range(rounds + 1):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            steps[name]()
            if index > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(over: list[float], under: list[float]) -> str:
    """Return the median of the ratios within a round, and its spread without the outer fifths."""
    ratios = sorted(a / b for a, b in zip(over, under, strict=True))
    low, high = ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
    return f"{statistics.median(ratios):.2f} [{low:.2f}-{high:.2f}]"


def one_rank(sizes: Sizes, rounds: int) -> Iterator[str]:
    wanted = reference(sizes)
    builders: dict[str, Callable[[], Step]] = {OURS: lambda: ours(sizes)}
    for name, implementation in (("Hugging Face, eager", "eager"), ("Hugging Face, grouped_mm", "grouped_mm")):
        builders[name] = lambda implementation=implementation: of_hugging_face(sizes, implementation)  # type: ignore[misc]
    steps: dict[str, Step] = {}
    for name, build in builders.items():
        try:
            steps[name] = build()
            found = steps[name]()
        except Exception as error:
            yield f"{name}: {first_line(error)}"
            steps.pop(name, None)
            continue
        shapes = zip(found, wanted, strict=True)
        error_of = max(float((a.double().view_as(b) - b).norm() / b.norm()) for a, b in shapes)
        if error_of > 1e-4:
            yield f"{name}: differs from the float64 computation by {error_of:.1e}"
            del steps[name]
    steps[PRODUCTS] = products_only(sizes)
    seconds = seconds_of_rounds(steps, rounds)
    yield f"| forward + backward, {torch.get_num_threads()} threads | ms | x products only | x fused-megatron |"
    yield "|---|---|---|---|"
    for name, taken in seconds.items():
        median = f"{1e3 * statistics.median(taken):.1f}"
        yield f"| {name} | {median} | {ratio(taken, seconds[PRODUCTS])} | {ratio(taken, seconds[OURS])} |"


def movement(sizes: Sizes, rounds: int) -> Iterator[str]:
    """Compare routing, order, permutation and combination with copies of the bytes that they read and write."""
    rule = RoutingRule(sizes.selected)
    logits = (sizes.x @ sizes.router.T).requires_grad_()
    x = sizes.x.clone().requires_grad_()
    pairs = sizes.tokens * sizes.selected
    grad_rows = torch.randn(pairs, sizes.hidden)
    wide = torch.randn(pairs, sizes.hidden)
    narrow = torch.randn(sizes.tokens, sizes.hidden)
    scores = torch.randn(sizes.tokens, sizes.experts)

    def step() -> None:
        routes = route_tokens(logits, rule)
        order = order_by_expert(routes.experts, sizes.experts)
        rows = permute_tokens(x, order)
        y = wide.detach().requires_grad_()
        out = combine_tokens(y, order, None)
        torch.autograd.grad(out, y, narrow)
        torch.autograd.grad(rows, x, grad_rows)
        torch.autograd.grad(routes.probabilities, logits, torch.ones_like(routes.probabilities))

    def copies() -> None:
        # Permutation and combination: a token is read once and written K times, or the other way, in four passes.
        for _ in range(2):
            wide.clone()
        for _ in range(2):
            narrow.clone()
        for _ in range(2):
            scores.clone()

    seconds = seconds_of_rounds({"movement": step, "copies": copies}, 4 * rounds)
    yield "| routing, order, permutation, combination | copies of their bytes | ratio |"
    yield "|---|---|---|"
    medians = [f"{1e3 * statistics.median(taken):.2f} ms" for taken in seconds.values()]
    yield f"| {medians[0]} | {medians[1]} | {ratio(seconds['movement'], seconds['copies'])} |"


def on_two_ranks(rank: int, ranks: int, routing: str, shape: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    """Return seconds of ExpertMLP on both ranks together, and of one rank by itself with all experts."""
    torch.set_num_threads(1)
    keep_malloc_pages()
    tokens, experts, selected, hidden, ffn = shape
    x, grad = torch.randn(tokens, hidden, requires_grad=True), torch.randn(tokens, hidden)
    layers = {
        "ep=2": ExpertMLP(experts, hidden, ffn, ep_group=dist.group.WORLD),
        "one rank": ExpertMLP(experts, hidden, ffn),
    }
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for index in range(rounds + 1):
        drawn = draw_routes(routing, tokens, experts, selected, rank=rank, num_ranks=ranks, step=index)
        for name, layer in layers.items():
            layer.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            if name != "one rank" or rank == 0:
                layer(x, drawn.experts, drawn.probabilities).backward(grad)
            dist.barrier()
            if index > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def two_ranks(sizes: Sizes, rounds: int) -> Iterator[str]:
    shape = (sizes.tokens, sizes.experts, sizes.selected, sizes.hidden, sizes.ffn)
    yield "| routes | ep=2, ms | one rank, ms | tokens a second of ep=2 over 2 x one rank |"
    yield "|---|---|---|---|"
    for routing in ROUTINGS:
        ((seconds, _),) = run_cases_on_ranks(on_two_ranks, 2, [(routing, shape, rounds)], timeout_s=600)
        both, one = (f"{1e3 * statistics.median(seconds[name]):.0f}" for name in ("ep=2", "one rank"))
        yield f"| {routing} | {both} | {one} | {ratio(seconds['one rank'], seconds['ep=2'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 2048), ("experts", 64), ("selected", 8), ("hidden", 256), ("ffn", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="threads of the parts with one rank")
    parser.add_argument(
        "--write", action="store_true", help="keep the tables in docs/results, and show them in docs/experts.md"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_malloc_pages()  # as training does, for every provider
    sizes = Sizes(options)
    tables = MeasuredTables(DOCS / "results" / "experts.json", DOCS / "experts.md", "make bench-experts ARGS=--write")
    for name, part in (("experts", one_rank), ("movement of tokens", movement), ("two ranks", two_ranks)):
        tables.add(name, part(sizes, options.rounds))
        print(flush=True)
    if options.write:
        tables.write()


if __name__ == "__main__":
    main()
