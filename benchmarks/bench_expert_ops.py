"""Speed of the ops of experts: routing, permutation and combination of tokens together, and the weighted activation.

Bytes of the first, for T tokens, K of E experts and width H, forward and backward: logits are read twice and their
gradient is written; 36 bytes a pair of token and expert for ids, places and probabilities; rows of tokens are copied to
K places and summed from there, forward and backward, and the gradient of the weights reads them once more.
"""

import torch
import torch.nn.functional as F

from fused_megatron import ops
from fused_megatron.benchmarking.side_by_side import Bars, Case

NUM_SELECTED = 8
# Not normalised: probabilities with the sum 1 would give back x itself, and logits a gradient of 0.
RULE = ops.RoutingRule(NUM_SELECTED, normalize=False)


def fused(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    routes = ops.route_tokens(logits, RULE)
    order = ops.order_by_expert(routes.experts, logits.shape[1])
    return ops.combine_tokens(ops.permute_tokens(x, order), order, routes.probabilities)


def unfused(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    weights, experts = logits.softmax(-1).topk(NUM_SELECTED, -1)
    order = experts.flatten().argsort(stable=True)
    rows = x[order // NUM_SELECTED]
    pairs = rows * weights.flatten()[order].unsqueeze(1).to(x.dtype)
    return torch.zeros_like(x).index_add(0, order // NUM_SELECTED, pairs)


def test_expert_permutation(bench, dtype):
    tokens, num_experts, width = bench.shape(cpu=(2048, 64, 256), gpu=(16384, 64, 2048), quick=(6, 16, 40))
    x = bench.normal((tokens, width), dtype)
    logits = bench.normal((tokens, num_experts), torch.float32)
    bench(
        Case(
            "route, permute, combine",
            f"[{tokens}, {width}], {NUM_SELECTED} of {num_experts}",
            (x, logits),
            ours=fused,
            unfused=unfused,
            num_bytes=(5 * NUM_SELECTED + 4) * x.nbytes + 3 * logits.nbytes + 36 * tokens * NUM_SELECTED,
            bars=Bars(eager=1.0, bound=1.5),
        )
    )


def weighted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up * weight.unsqueeze(1).to(x.dtype)


def test_weighted_swiglu(bench, dtype):
    rows, width = bench.shape(cpu=(16384, 512), gpu=(131072, 1024), quick=(6, 40))
    x = bench.normal((rows, 2 * width), dtype)
    bench(
        Case(
            "weighted_swiglu",
            f"[{rows}, {width}]",
            (x, bench.normal((rows,), torch.float32)),
            ours=bench.op("weighted_swiglu"),
            unfused=weighted,
            num_bytes=4 * x.nbytes,
            bars=Bars(eager=1.4, bound=1.5),
        )
    )
