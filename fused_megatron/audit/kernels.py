"""Kernels of the audit, with one function per op. To add an op, write its function and list it in OPS."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import fused_megatron.ops.vocab_embedding  # noqa: F401 - defines the ops, which only models call
from fused_megatron import ops
from fused_megatron.ops.rotary_query_key_value import rotary_query_key_value, split_query_key_value

TOKENS = 8192
MULTIPROCESSORS = 132  # of an H100
HIDDEN = (1024, 4096, 8192, 16384)
EXPERTS = (64, 256)
VOCAB = (32768, 131072, 262144)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RATIO_LIMIT = 1.02  # bytes issued / bytes that must move, without partial sums
PARTIALS_LIMIT = 0.02  # bytes of partial sums of parameter gradients / bytes that must move

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Step:
    """One direction of an op. `run` must read each of `reads` and write each of `writes` at least once."""

    name: str
    run: Callable[[], Any]
    reads: Tensors
    writes: Tensors

    @property
    def bound_bytes(self) -> int:
        """Bytes that must move: each tensor once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.reads, *self.writes))


@dataclass(frozen=True)
class Op:
    """An op of the audit.

    Attributes:
        steps: maps (rows, width, dtype) to the directions, forward first; nothing runs before Step.run is called.
        widths: the widths of the audit.
        rows: tokens over which bytes are counted; a few for Triton kernels, which treat every row in the same way. For
            an op over weights: rows of a matrix.
        language: "cuda" or "triton".
        known: maps (step, width, dtype) to the reason why a limit is exceeded there.
        instructions: maps step to the limit of instructions for an element (bf16 on sm_90a).
        elements: of the output, for each token and column of the width; 0: instructions are not counted.
        thread_elements: maps dtype to the elements of a thread in an iteration of the main loop; without it they are
            found from the accesses.
    """

    steps: Callable[[int, int, torch.dtype], list[Step]]
    widths: tuple[int, ...]
    rows: int = TOKENS
    language: str = "cuda"
    known: dict[tuple[str, int, str], str] = field(default_factory=dict)
    instructions: dict[str, float] = field(default_factory=dict)
    elements: float = 1.0
    thread_elements: dict[str, int] = field(default_factory=dict)


def _new(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.Tensor:
    # Not initialised: untouched pages need no memory, and no count depends on a value.
    return torch.empty(shape, dtype=dtype).requires_grad_(grad)


def _both(
    run: Callable[[], Any],
    leaves: Tensors,
    forward: tuple[Tensors, Tensors],
    backward: tuple[Tensors, Tensors],
    dy: torch.Tensor,
) -> list[Step]:
    """Return forward and backward of an op under autograd."""
    results: list[Any] = []

    def run_forward() -> None:
        y = run()
        results[:] = [y[0] if isinstance(y, tuple) else y]

    def run_backward() -> None:
        torch.autograd.grad(results[0], list(leaves), dy)

    return [Step("forward", run_forward, *forward), Step("backward", run_backward, *backward)]


def _bias_gelu(approximate: str) -> Callable[[int, int, torch.dtype], list[Step]]:
    def steps(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
        x = _new(rows, width, dtype=dtype)
        bias = _new(width, dtype=dtype)
        y = _new(rows, width, dtype=dtype, grad=False)
        backward = ((y, x, bias), (x, bias))
        return _both(lambda: ops.bias_gelu(x, bias, approximate), (x, bias), ((x, bias), (y,)), backward, y)

    return steps


def _gated(name: str) -> Callable[[int, int, torch.dtype], list[Step]]:
    def steps(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
        op = getattr(ops, name)
        x = _new(rows, 2 * width, dtype=dtype)
        bias = _new(2 * width, dtype=dtype)
        y = _new(rows, width, dtype=dtype, grad=False)
        return _both(lambda: op(x, bias), (x, bias), ((x, bias), (y,)), ((y, x, bias), (x, bias)), y)

    return steps


def _layer_norm(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    x = _new(rows, width, dtype=dtype)
    y = _new(rows, width, dtype=dtype, grad=False)
    weight = _new(width, dtype=dtype)
    bias = _new(width, dtype=dtype)
    statistic = _new(rows)
    forward = (x, weight, bias), (y, statistic, statistic)
    backward = (y, x, weight, statistic, statistic), (x, weight, bias)
    return _both(lambda: ops.layer_norm(x, weight, bias), (x, weight, bias), forward, backward, y)


def _rms_norm(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    x = _new(rows, width, dtype=dtype)
    y = _new(rows, width, dtype=dtype, grad=False)
    weight = _new(width, dtype=dtype)
    statistic = _new(rows)
    forward = ((x, weight), (y, statistic))
    backward = ((y, x, weight, statistic), (x, weight))
    return _both(lambda: ops.rms_norm(x, weight), (x, weight), forward, backward, y)


def _rms_norm_residual(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    x = _new(rows, width, dtype=dtype)
    residual = _new(rows, width, dtype=dtype)
    weight = _new(width, dtype=dtype)
    statistic = _new(rows)
    y = _new(rows, width, dtype=dtype, grad=False)
    results: list[torch.Tensor] = []

    def forward() -> None:
        results[:] = ops.rms_norm(x, weight, residual=residual)

    def backward() -> None:
        torch.autograd.grad(results, [x, weight, residual], [y, y])

    # The gradients of x and residual are one tensor here, which is written once.
    return [
        Step("forward", forward, (x, residual, weight), (y, y, statistic)),
        Step("backward", backward, (y, y, x, weight, statistic), (x, weight)),
    ]


def _bias_dropout_add(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    x = _new(rows, width, dtype=dtype)
    residual = _new(rows, width, dtype=dtype)
    bias = _new(width, dtype=dtype)
    y = _new(rows, width, dtype=dtype, grad=False)
    state = torch.tensor([1, 2])
    return _both(
        lambda: ops.bias_dropout_add(x, bias, residual, 0.1, rng_state=state),
        (x, bias, residual),
        ((x, bias, residual), (y,)),
        ((y,), (x, bias)),
        y,
    )


_HEAD_DIM = 128


def _rotary_embedding(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    heads = width // _HEAD_DIM
    q, k = (_new(rows, 1, n, _HEAD_DIM, dtype=dtype) for n in (heads, max(1, heads // 4)))
    cos, sin = (_new(rows, _HEAD_DIM // 2, grad=False) for _ in range(2))
    results: list[torch.Tensor] = []

    def forward() -> None:
        results[:] = [y for y in ops.rotary_embedding(q, k, cos, sin) if y is not None]

    def backward() -> None:
        torch.autograd.grad(results, [q, k], [q.detach(), k.detach()])

    return [Step("forward", forward, (q, k, cos, sin), (q, k)), Step("backward", backward, (q, k, cos, sin), (q, k))]


def _query_key_value(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor], Any]:
    """Return qkv of grouped heads, query, key and value as its parts, and the sizes for the ops."""
    heads = width // _HEAD_DIM
    form = {"num_heads": heads, "num_kv_heads": max(1, heads // 4)}
    qkv = _new(rows, 1, (heads + 2 * form["num_kv_heads"]) * _HEAD_DIM, dtype=dtype, grad=False)
    return qkv, list(split_query_key_value(qkv, **form, head_by_head=False)), form


def _rotary_in_place(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    qkv, (query, key, _), form = _query_key_value(rows, width, dtype)
    _, results, _ = _query_key_value(rows, width, dtype)
    tables = [_new(rows, _HEAD_DIM // 2, grad=False) for _ in range(2)]

    def backward() -> None:
        torch.ops.fused_megatron.rotary_embedding_out(query, key, *results[:2], *tables, 0, True)

    reads, writes = (query, key, *tables), (query, key)
    forward = Step("forward", lambda: rotary_query_key_value(qkv, *tables, **form), reads, writes)
    return [forward, Step("backward", backward, reads, writes)]


def _query_key_norm(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    qkv, (query, key, value), form = _query_key_value(rows, width, dtype)
    leaves = [qkv.requires_grad_(), *(_new(_HEAD_DIM, dtype=dtype) for _ in range(2))]
    tables = [_new(rows, _HEAD_DIM // 2, grad=False) for _ in range(2)]
    upstream = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    results: list[torch.Tensor] = []

    def forward() -> None:
        results[:] = ops.query_key_norm(*leaves, *tables, eps=1e-5, **form)

    def backward() -> None:
        torch.autograd.grad(results, leaves, upstream)

    weights = leaves[1:]
    return [
        Step("forward", forward, (query, key, *weights, *tables), (query, key)),
        Step("backward", backward, (*upstream, query, key, *weights, *tables), leaves),
    ]


def _vocab_embedding(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    """Look up as many tokens as the table has rows, each another row."""
    table, total = _new(rows, width, dtype=dtype, grad=False), _new(rows, width, grad=False)
    ids, library = torch.arange(rows), torch.ops.fused_megatron
    reads = (table, ids, ids, total)  # backward reads the sorted rows and the token of each
    return [
        Step("forward", lambda: library.vocab_embedding_forward(ids, table, 0, rows), (ids, table), (table, ids)),
        Step("backward", lambda: library.vocab_embedding_backward_(table, ids, total), reads, (total,)),
    ]


def _cross_entropy(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    logits = _new(rows, width, dtype=dtype)
    target = torch.zeros(rows, dtype=torch.int64)
    loss = _new(rows)
    lse = _new(rows, 2)
    upstream = torch.ones(rows)
    return _both(
        lambda: ops.cross_entropy(logits, target, reduction="none").float(),
        (logits,),
        ((logits, target), (loss, lse)),
        ((logits, target, loss, lse), (logits,)),
        upstream,
    )


def _scaled_masked_softmax(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    x = _new(rows, width, dtype=dtype)
    y = _new(rows, width, dtype=dtype, grad=False)
    return _both(lambda: ops.scaled_masked_softmax(x, scale=0.1), (x,), ((x,), (y,)), ((y, y), (x,)), y)


_MATRIX_ROWS = 64  # of a weight: enough blocks to count, few enough elements to allocate several times


def _adamw(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    main, exp_avg, exp_avg_sq, gradient = (_new(rows, width, grad=False) for _ in range(4))
    low = [] if dtype == torch.float32 else [_new(rows, width, dtype=dtype, grad=False)]
    read, written = (main, exp_avg, exp_avg_sq, gradient), (main, exp_avg, exp_avg_sq, *low)

    def update(zero_gradient: bool) -> None:
        lists = ([tensor] for tensor in read)
        ops.adamw_(*lists, step=1, lr=1e-3, low=low, zero_gradient=zero_gradient)

    return [
        Step("update", lambda: update(False), read, written),
        Step("update, zero", lambda: update(True), read, (*written, gradient)),
    ]


def _sum_of_squares(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    tensors = [_new(rows, width, grad=False), _new(width, grad=False)]
    total = _new(1, dtype=torch.float64, grad=False)
    return [Step("sum", lambda: ops.sum_of_squares(tensors), tensors, (total,))]


_SELECTED = 8  # experts of a token


def _expert_routing(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    """Route tokens to `width` experts; logits are float32 in any case."""
    logits = _new(rows, width)
    rule = ops.RoutingRule(_SELECTED)
    probabilities = _new(rows, _SELECTED, grad=False)
    sums = _new(1, width, grad=False)
    z = _new(grad=False)
    experts = torch.empty((rows, _SELECTED), dtype=torch.int64)
    counts = torch.empty((1, width), dtype=torch.int64)
    results: list[torch.Tensor] = []

    def forward() -> None:
        routes = ops.route_tokens(logits, rule)
        results[:] = [routes.probabilities, routes.score_sums, routes.z]

    def backward() -> None:
        torch.autograd.grad(results, [logits], [probabilities, sums, z])

    return [
        Step("forward", forward, (logits,), (experts, probabilities, counts, sums, z)),
        Step("backward", backward, (probabilities, sums, z, logits, experts), (logits,)),
    ]


def _expert_order(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    """Sort the pairs of tokens and `width` experts."""
    experts = torch.zeros((rows, _SELECTED), dtype=torch.int64)
    counts = torch.empty(width, dtype=torch.int64)
    return [Step("sort", lambda: ops.order_by_expert(experts, width), (experts,), (experts, experts, counts))]


def _order_of(rows: int) -> ops.ExpertOrder:
    pairs = torch.arange(rows * _SELECTED)
    return ops.ExpertOrder(pairs, pairs.view(rows, _SELECTED), pairs[:1])


def _permute_tokens(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    order = _order_of(rows)
    x = _new(rows, width, dtype=dtype)
    y = _new(rows * _SELECTED, width, dtype=dtype, grad=False)
    forward = ((x, order.places), (y,))
    return _both(lambda: ops.permute_tokens(x, order), (x,), forward, ((y, order.places), (x,)), y)


def _combine_tokens(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    order = _order_of(rows)
    y = _new(rows * _SELECTED, width, dtype=dtype)
    weights = _new(rows, _SELECTED)
    out = _new(rows, width, dtype=dtype, grad=False)
    forward = ((y, order.places, weights), (out,))
    backward = ((out, y, order.places, weights), (y, weights))
    return _both(lambda: ops.combine_tokens(y, order, weights), (y, weights), forward, backward, out)


def _weighted_swiglu(rows: int, width: int, dtype: torch.dtype) -> list[Step]:
    x = _new(rows, 2 * width, dtype=dtype)
    weight = _new(rows)
    y = _new(rows, width, dtype=dtype, grad=False)
    backward = ((y, x, weight), (x, weight))
    return _both(lambda: ops.weighted_swiglu(x, weight), (x, weight), ((x, weight), (y,)), backward, y)


_NORM_ELEMENTS = {"bf16": 32, "fp32": 32}  # kNormColumns in csrc/norm/rows.cuh
_UPDATE_ELEMENTS = {"bf16": 8, "fp32": 8}  # two accesses of a thread to each float32 tensor in csrc/adamw/kernels.cuh
_TILE_ELEMENTS = {"bf16": 16, "fp32": 8}  # _LANES vectors for 128 threads in kernels/cross_entropy.py
_PARTIALS = (
    "each of 132 multiprocessors has 62 rows, 372 bytes per column, and two float32 sums, 16 bytes per column to write "
    "and read; fewer blocks would leave multiprocessors idle"
)
_SORT = (
    "a counting sort reads the ids twice, and writes and reads a count for each expert and part of 256 pairs; ids and "
    "places are numbers of 8 bytes, one for a thread"
)
_ROUTED = (
    "parts of 64 tokens, so that few tokens fill the GPU, have partial counts and sums; sm_90a spills 8 bytes; with "
    "256 experts the compiler stores ids and probabilities in pieces of 64 bits"
)
_OF_SEQUENCE = "each token reads the gradients of the sums of its sequence, E numbers that stay in the cache"
_SPILLS = "a program holds a whole row in registers, and ptxas spills two of them"

OPS: dict[str, Op] = {
    "adamw": Op(_adamw, (1024, 4096), rows=_MATRIX_ROWS, thread_elements=_UPDATE_ELEMENTS),
    "bias_dropout_add": Op(_bias_dropout_add, HIDDEN, instructions={"forward": 18, "backward": 17}),
    "bias_geglu": Op(_gated("bias_geglu"), HIDDEN, instructions={"forward": 20, "backward": 35}),
    "bias_gelu": Op(_bias_gelu("tanh"), HIDDEN, instructions={"forward": 16, "backward": 26}),
    "bias_gelu, exact": Op(_bias_gelu("none"), HIDDEN, instructions={"forward": 23, "backward": 32}),
    "bias_swiglu": Op(_gated("bias_swiglu"), HIDDEN, instructions={"forward": 18, "backward": 31}),
    "layer_norm": Op(
        _layer_norm,
        HIDDEN,
        instructions={"forward": 18, "backward": 26},
        thread_elements=_NORM_ELEMENTS,
        known={("backward", width, "bf16"): _PARTIALS for width in HIDDEN},
    ),
    "rms_norm": Op(_rms_norm, HIDDEN, instructions={"forward": 14, "backward": 22}, thread_elements=_NORM_ELEMENTS),
    "rms_norm, residual": Op(_rms_norm_residual, HIDDEN, thread_elements=_NORM_ELEMENTS),
    "query_key_norm": Op(_query_key_norm, HIDDEN, elements=1.25, instructions={"forward": 26, "backward": 37}),
    "rotary_embedding": Op(_rotary_embedding, HIDDEN, elements=1.25, instructions={"forward": 9.5, "backward": 9.5}),
    "rotary_embedding, in place": Op(
        _rotary_in_place, HIDDEN, elements=1.25, instructions={"forward": 9.5, "backward": 9.5}
    ),
    "sum_of_squares": Op(_sum_of_squares, (1024, 4096), rows=_MATRIX_ROWS),
    "cross_entropy": Op(_cross_entropy, VOCAB, rows=4, language="triton", thread_elements=_TILE_ELEMENTS),
    "scaled_masked_softmax": Op(
        _scaled_masked_softmax, HIDDEN, rows=16, language="triton", known={("backward", 4096, "fp32"): _SPILLS}
    ),
    "expert_permutation, combine": Op(_combine_tokens, HIDDEN, rows=16, language="triton"),
    "expert_permutation, order": Op(
        _expert_order,
        EXPERTS,
        rows=256,
        language="triton",
        elements=0,
        known={("sort", width, dtype): _SORT for width in EXPERTS for dtype in DTYPES},
    ),
    "expert_permutation, permute": Op(_permute_tokens, HIDDEN, rows=16, language="triton", elements=_SELECTED),
    "expert_routing": Op(
        _expert_routing,
        EXPERTS,
        rows=256,
        language="triton",
        elements=0,
        known={
            (step, width, dtype): reason
            for step, reason in (("forward", _ROUTED), ("backward", _OF_SEQUENCE))
            for width in EXPERTS
            for dtype in DTYPES
        },
    ),
    "vocab_embedding": Op(_vocab_embedding, HIDDEN, rows=16, language="triton"),
    "weighted_swiglu": Op(_weighted_swiglu, HIDDEN, rows=16, language="triton"),
}


def source_of(op: str) -> str:
    """Return the stem of the op's files."""
    return op.partition(",")[0]
