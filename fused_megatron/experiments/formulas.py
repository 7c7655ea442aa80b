"""Arithmetic formulas of the experiments, such as "(6 + 12 / dp) * parameters", over the sizes of a run."""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from fused_megatron.checks import InputError
from fused_megatron.config import TrainConfig

_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {"min": min, "max": max}


def sizes_of_run(config: TrainConfig) -> dict[str, float]:
    """Return the sizes of a run by the names of formulas.

    Names: tp, pp, dp, cp, ep, etp: ranks of an axis. v: stages of a rank. m: microbatches of a rank in a step.
    microbatch: sequences of a microbatch. layers, hidden, ffn, heads, kv_heads, seq, vocab. experts, topk: of a layer,
    and of a token. size: bytes of a weight.
    """
    model, parallel, training = config.model, config.parallel, config.training
    dp = parallel.data_parallel_size or 1
    return {
        "tp": parallel.tensor_parallel_size,
        "pp": parallel.pipeline_parallel_size,
        "dp": dp,
        "cp": parallel.context_parallel_size,
        "ep": parallel.expert_parallel_size,
        "etp": parallel.expert_tensor_parallel_size,
        "v": parallel.stages_per_rank or 1,
        "m": training.global_batch_size // training.microbatch_size // dp,
        "microbatch": training.microbatch_size,
        "layers": model.num_layers,
        "hidden": model.hidden_size,
        "ffn": model.ffn_size,
        "heads": model.num_heads,
        "kv_heads": model.kv_heads,
        "seq": model.seq_len,
        "vocab": model.vocab_size or 0,
        "experts": model.num_experts or 0,
        "topk": model.experts_per_token,
        "size": training.element_bytes,
    }


def evaluate(formula: str, names: Mapping[str, float]) -> float:
    """Compute a formula of numbers, names, + - * / //, brackets, min and max.

    Raises:
        InputError: an unknown name, or anything but arithmetic.
    """
    try:
        return float(_value(ast.parse(formula, mode="eval").body, names))
    except (SyntaxError, ZeroDivisionError, TypeError) as error:
        raise InputError(f"formula={formula!r:.80} cannot be computed: {error}") from None


def _value(node: ast.AST, names: Mapping[str, float]) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise InputError(f"formula: name={node.id!r} must be one of {', '.join(sorted(names))}")
        return names[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, names), _value(node.right, names))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand, names))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        return _FUNCTIONS[node.func.id](*(_value(argument, names) for argument in node.args))
    raise InputError(f"formula: {ast.unparse(node)!r:.60} must be arithmetic: numbers, names, + - * / //, min, max")
