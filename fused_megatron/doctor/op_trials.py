"""Trials of every op on a device: one call forward and backward, compared with the same op in float64 on the CPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fused_megatron import ops
from fused_megatron.checks import first_line
from fused_megatron.doctor.facts import OpTrial
from fused_megatron.ops.rotary_query_key_value import rotary_query_key_value
from fused_megatron.ops.vocab_embedding import add_embedding_gradient_, vocab_embedding
from fused_megatron.testing.op_gradients import Op, is_leaf, output_and_gradients, outputs_of

# Twice to ten times the error of a right kernel at these sizes; a wrong one is off by its whole result.
BARS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest error of an output or gradient: norm of the difference over norm of the right values, by dtype."""
_TOKENS, _WIDTH, _EXPERTS = 40, 264, 4  # whole vectors of 8 elements, but no whole tile
_SEED = 20

Draw = Callable[[torch.Generator], list[torch.Tensor]]


@dataclass(frozen=True)
class Trial:
    """A call of an op.

    Attributes:
        op: name in fused_megatron.ops.
        call: the op as a function of tensors; it returns one or several outputs.
        draw: draws the tensors, float32 or integers, on the CPU.
        dtypes: dtypes of the floating-point tensors.
        right: computes the right values from float64 tensors, if the op itself takes no float64.
        has_gradient: whether the op has a backward.
    """

    op: str
    call: Op
    draw: Draw
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    right: Op | None = None
    has_gradient: bool = True


def _normal(*shapes: tuple[int, ...]) -> Draw:
    return lambda generator: [torch.randn(shape, generator=generator) for shape in shapes]


def _with_index(most: int, *shapes: tuple[int, ...], count: int = _TOKENS) -> Draw:
    """Draw normal tensors, and indices below `most`."""
    return lambda generator: [*_normal(*shapes)(generator), torch.randint(most, (count,), generator=generator)]


def _adamw(
    main: torch.Tensor, moment: torch.Tensor, square: torch.Tensor, gradient: torch.Tensor
) -> Sequence[torch.Tensor]:
    weight, first, second = main.clone(), moment.clone(), square.square()
    ops.adamw_([weight], [first], [second], [gradient], step=3, lr=1e-2)
    return [weight, first, second]


def _adamw_in_torch(
    main: torch.Tensor, moment: torch.Tensor, square: torch.Tensor, gradient: torch.Tensor
) -> Sequence[torch.Tensor]:
    """One update of torch.optim.AdamW, with the defaults of ops.adamw_."""
    weight = torch.nn.Parameter(main.clone())
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.01)
    state = {"step": torch.tensor(2.0), "exp_avg": moment.clone(), "exp_avg_sq": square.square()}
    optimizer.state[weight] = state
    weight.grad = gradient
    optimizer.step()
    return [weight.detach(), state["exp_avg"], state["exp_avg_sq"]]


def _dropout(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    return ops.bias_dropout_add(x, bias, residual, 0.1, rng_state=state)


def _draw_dropout(generator: torch.Generator) -> list[torch.Tensor]:
    x, bias, residual = _normal((_TOKENS, _WIDTH), (_WIDTH,), (_TOKENS, _WIDTH))(generator)
    return [x, bias, residual, torch.tensor([_SEED, 7])]


def _rotary(query: torch.Tensor, key: torch.Tensor, degrees: torch.Tensor) -> Sequence[torch.Tensor | None]:
    angles = degrees.float().deg2rad()
    return ops.rotary_embedding(query, key, angles.cos(), angles.sin())


def _draw_rotary(generator: torch.Generator) -> list[torch.Tensor]:
    query, key = _normal((_TOKENS, 2, 4, 64), (_TOKENS, 2, 2, 64))(generator)
    return [query, key, torch.randint(360, (_TOKENS, 32), generator=generator)]


def _fused_heads(degrees: torch.Tensor, dtype: torch.dtype) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Return 4 query and 2 key heads as the ops take them, and tables in the dtype of other tables."""
    angles = degrees.to(torch.promote_types(dtype, torch.float32)).deg2rad()
    return {"num_heads": 4, "num_kv_heads": 2}, [angles.cos(), angles.sin()]


def _rotary_in_place(qkv: torch.Tensor, degrees: torch.Tensor) -> Sequence[torch.Tensor]:
    form, tables = _fused_heads(degrees, qkv.dtype)
    return rotary_query_key_value(qkv + 0, *tables, **form)  # the sum is overwritten


def _query_key_norm(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, degrees: torch.Tensor
) -> Sequence[torch.Tensor]:
    form, tables = _fused_heads(degrees, qkv.dtype)
    return ops.query_key_norm(qkv, q_weight, k_weight, *tables, eps=1e-5, **form)


def _draw_heads(*weights: int) -> Draw:
    def draw(generator: torch.Generator) -> list[torch.Tensor]:
        tensors = _normal((_TOKENS, 2, 8 * 64), *((size,) for size in weights))(generator)
        return [*tensors, torch.randint(360, (_TOKENS, 16), generator=generator)]

    return draw


def _vocab_embedding(weight: torch.Tensor, dy: torch.Tensor, ids: torch.Tensor) -> Sequence[torch.Tensor]:
    """Rows of a shard with 8 of 16 rows, and the sum of their gradients."""
    rows, local = vocab_embedding(ids, weight, first_row=4, vocab_size=16)
    total = torch.ones(weight.shape, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    add_embedding_gradient_(dy, local, total)
    return [rows, local, total]


def _experts(experts: torch.Tensor) -> ops.ExpertOrder:
    return ops.order_by_expert(experts.view(_TOKENS, -1), _EXPERTS)


def _routes(logits: torch.Tensor) -> Sequence[torch.Tensor]:
    routes = ops.route_tokens(logits, ops.RoutingRule(num_selected=2))
    return [routes.probabilities, routes.experts, routes.counts]


def _routes_in_torch(logits: torch.Tensor) -> Sequence[torch.Tensor]:
    scores, experts = logits.softmax(-1).topk(2)
    probabilities = scores / scores.sum(-1, keepdim=True)
    counts = torch.bincount(experts.flatten(), minlength=logits.shape[1])
    return [probabilities, experts, counts[None]]


def _sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    return ops.sum_of_squares([x])


def _weighted_swiglu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ops.weighted_swiglu(x, weight.to(torch.promote_types(x.dtype, torch.float32)))


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return ops.scaled_masked_softmax(x, scale=0.5, causal=True)


_ROWS = (_TOKENS, _WIDTH)
TRIALS = (
    Trial("adamw_", _adamw, _normal(_ROWS, _ROWS, _ROWS, _ROWS), (torch.float32,), _adamw_in_torch, False),
    Trial("bias_dropout_add", _dropout, _draw_dropout),
    Trial("bias_geglu", ops.bias_geglu, _normal(_ROWS, (_WIDTH,))),
    Trial("bias_gelu", ops.bias_gelu, _normal(_ROWS, (_WIDTH,))),
    Trial("bias_swiglu", ops.bias_swiglu, _normal(_ROWS, (_WIDTH,))),
    Trial(
        "combine_tokens",
        lambda y, e: ops.combine_tokens(y, _experts(e)),
        _with_index(_EXPERTS, (2 * _TOKENS, _WIDTH), count=2 * _TOKENS),
    ),
    Trial("cross_entropy", ops.cross_entropy, _with_index(_WIDTH, _ROWS)),
    Trial("layer_norm", ops.layer_norm, _normal(_ROWS, (_WIDTH,), (_WIDTH,))),
    Trial("linear_cross_entropy", ops.linear_cross_entropy, _with_index(_WIDTH, (_TOKENS, 64), (_WIDTH, 64))),
    Trial("order_by_expert", lambda e: [_experts(e).places], _with_index(_EXPERTS), has_gradient=False),
    Trial(
        "permute_tokens",
        lambda x, e: ops.permute_tokens(x, _experts(e)),
        _with_index(_EXPERTS, _ROWS, count=2 * _TOKENS),
    ),
    Trial("query_key_norm", _query_key_norm, _draw_heads(64, 64)),
    Trial("rms_norm", ops.rms_norm, _normal(_ROWS, (_WIDTH,))),
    Trial("rotary_embedding", _rotary, _draw_rotary),
    Trial("rotary_query_key_value", _rotary_in_place, _draw_heads()),
    Trial("route_tokens", _routes, _normal((_TOKENS, 16)), (torch.float32,), _routes_in_torch),
    Trial("scaled_masked_softmax", _softmax, _normal((2, 3, _TOKENS, _TOKENS))),
    Trial("sum_of_squares", _sum_of_squares, _normal(_ROWS), (torch.float32,), lambda x: x.square().sum(), False),
    Trial("vocab_embedding", _vocab_embedding, _with_index(16, (8, _WIDTH), _ROWS), has_gradient=False),
    Trial("weighted_swiglu", _weighted_swiglu, _normal(_ROWS, (_TOKENS,))),
)
"""A trial of each op that has kernels of its own, and of the two that only models call."""


def try_ops(device: torch.device, trials: Sequence[Trial] = TRIALS) -> tuple[OpTrial, ...]:
    """Run the trials on a device, and return their errors. An op that raises is a result, too."""
    found = []
    for trial in trials:
        errors: dict[torch.dtype, float] = {}
        problem = None
        try:
            for dtype in trial.dtypes:
                errors[dtype] = _largest_error(trial, device, dtype)
        except Exception as error:  # a compiler, a driver or a kernel may raise anything
            problem = first_line(error)[:200]
        over = [dtype for dtype, error in errors.items() if not error <= BARS[dtype]]  # NaN is over
        if over and problem is None:
            name = str(over[0]).removeprefix("torch.")
            problem = f"its results in {name} are off by {errors[over[0]]:.1e} (at most {BARS[over[0]]:.0e})"
        worst = max(errors.values(), default=None)
        found.append(OpTrial(trial.op, worst, problem))
    return tuple(found)


def _largest_error(trial: Trial, device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(_SEED)
    inputs = [t.to(dtype) if is_leaf(t) else t for t in trial.draw(generator)]
    exact = [t.double() if is_leaf(t) else t for t in inputs]
    reference = trial.right or trial.call
    upstream = [torch.randn(y.shape, generator=generator).to(dtype) for y in outputs_of(reference, exact) if is_leaf(y)]

    def results(op: Op, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        outputs = outputs_of(op, tensors)
        if not trial.has_gradient:
            return outputs
        dy = [d.to(y) for d, y in zip(upstream, outputs, strict=False)]
        return [y.detach() for y in output_and_gradients(op, tensors, dy)]

    right = results(reference, exact)
    actual = results(trial.call, [t.to(device) for t in inputs])
    return max(_error(a.cpu(), b) for a, b in zip(actual, right, strict=True))


def _error(actual: torch.Tensor, right: torch.Tensor) -> float:
    if not right.is_floating_point():
        return 0.0 if torch.equal(actual, right) else float("inf")
    difference = (actual.double() - right.double()).norm()
    return float(difference / right.double().norm().clamp_min(1e-30))
