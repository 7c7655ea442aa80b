"""Routing of tokens to experts: scores, top-k selection, probabilities, and the sums that balance losses need."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.checks import (
    InputError,
    check_divisible,
    check_dtype,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
)
from fused_megatron.ops.autograd_function import AutogradFunction, is_differentiated
from fused_megatron.ops.registration import define_op, register_triton
from fused_megatron.reference import expert_routing as reference


@dataclass(frozen=True)
class RoutingRule:
    """The rule by which a token selects its experts.

    Attributes:
        num_selected: K, the experts of a token.
        scores: "softmax" of the logits over all experts, or "sigmoid" of each logit.
        normalize: divide the scores of the selected experts by their sum.
        scale: factor of the probabilities.
        num_groups: the experts form this number of groups of neighbours; None: one group.
        groups_per_token: a token selects experts only in its best groups: those with the largest sum of their two best
            scores (DeepSeek-V3). Given exactly if num_groups is.
    """

    num_selected: int
    scores: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    num_groups: int | None = None
    groups_per_token: int | None = None

    def __post_init__(self) -> None:
        check_positive("num_selected", self.num_selected)
        check_one_of("scores", self.scores, ("softmax", "sigmoid"))
        if (self.num_groups is None) != (self.groups_per_token is None):
            raise InputError(
                f"num_groups={self.num_groups} and groups_per_token={self.groups_per_token} must be given together"
            )
        if self.num_groups is not None and self.groups_per_token is not None:
            check_positive("groups_per_token", self.groups_per_token)
            if self.groups_per_token > self.num_groups:
                raise InputError(
                    f"groups_per_token={self.groups_per_token} must be at most num_groups={self.num_groups}"
                )

    def check_experts(self, num_experts: int) -> None:
        """Raise InputError unless a token can select its experts among num_experts."""
        candidates, among = num_experts, "num_experts"
        if self.num_groups is not None and self.groups_per_token is not None:
            check_divisible("num_experts", num_experts, "num_groups", self.num_groups)
            candidates = num_experts // self.num_groups * self.groups_per_token
            among = "the number of experts of groups_per_token groups"
        if self.num_selected > candidates:
            raise InputError(f"num_selected={self.num_selected} must be at most {among}, {candidates}")


class Routes(NamedTuple):
    """Selected experts of T tokens in B sequences, their probabilities, and sums over each sequence.

    Attributes:
        experts: [T, K] int64; best first.
        probabilities: [T, K] float32; differentiable.
        counts: [B, E] int64; the tokens of a sequence that selected an expert.
        score_sums: [B, E] float32; sums of the scores over the tokens of a sequence; sigmoid scores are divided by
            their sum over the experts first (DeepSeek-V3). Differentiable.
        z: [] float32; sum over the tokens of logsumexp(logits)^2. Differentiable.
    """

    experts: torch.Tensor
    probabilities: torch.Tensor
    counts: torch.Tensor
    score_sums: torch.Tensor
    z: torch.Tensor


def _fake_forward(
    logits: torch.Tensor, bias: torch.Tensor | None, num_selected: int, *rule: Any
) -> tuple[torch.Tensor, ...]:
    num_rows, num_experts = logits.shape
    of_sequences = (rule[-1], num_experts)
    return (
        logits.new_empty((num_rows, num_selected), dtype=torch.int64),
        logits.new_empty((num_rows, num_selected)),
        logits.new_empty(of_sequences, dtype=torch.int64),
        logits.new_empty(of_sequences),
        logits.new_empty(()),
    )


_forward = define_op(
    "expert_routing_forward(Tensor logits, Tensor? bias, int num_selected, bool sigmoid, bool normalize, float scale,"
    " int num_groups, int groups_per_token, int num_sequences) -> (Tensor experts, Tensor probabilities,"
    " Tensor counts, Tensor score_sums, Tensor z)",
    reference=reference.expert_routing_forward,
    fake=_fake_forward,
)
_backward = define_op(
    "expert_routing_backward(Tensor grad_probabilities, Tensor grad_score_sums, Tensor grad_z, Tensor logits,"
    " Tensor experts, bool sigmoid, bool normalize, float scale) -> Tensor",
    reference=reference.expert_routing_backward,
    fake=lambda grad_probabilities, grad_score_sums, grad_z, logits, *others: logits.new_empty(logits.shape),
)
register_triton("expert_routing_forward", "expert_routing")
register_triton("expert_routing_backward", "expert_routing")


class ExpertRouting(AutogradFunction):
    """Routes of logits: apply(logits, bias, *arguments of the raw op)."""

    op = "ops.route_tokens"

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, bias: torch.Tensor | None, *rule: Any) -> tuple[torch.Tensor, ...]:
        routes = _forward(logits, bias, *rule)
        ctx.save_for_backward(logits, routes[0])
        ctx.rule = rule[1:4]
        ctx.mark_non_differentiable(routes[0], routes[2])
        return routes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        _, grad_probabilities, _, grad_score_sums, grad_z = grads
        grad = _backward(grad_probabilities, grad_score_sums, grad_z, *ctx.saved_tensors, *ctx.rule)
        return grad, *(None for _ in range(8))


def route_tokens(
    logits: torch.Tensor, rule: RoutingRule, *, bias: torch.Tensor | None = None, num_sequences: int = 1
) -> Routes:
    """Select the experts of each token, and return their probabilities and the sums of balance losses.

    For a token with logits x:

        s = softmax(x) or sigmoid(x)
        experts = the K largest s + bias, within the groups of the rule
        probabilities = scale * s[experts] / sum(s[experts])      (without the sum if the rule does not normalise)

    Args:
        logits: [T, E] float32 or float64. Row r belongs to sequence r % B, as in the [T, E] view of [S, B, E].
        rule: the rule of selection.
        bias: [E] float32, or None; added to the scores for the selection only, so that it has no gradient
            (balancing without a loss, arXiv:2408.15664).
        num_sequences: B; a divisor of T.

    Returns:
        Routes. The experts are ordered by descending score (with bias); ties go to the lower index. Without a bias and
        groups, logits are compared, not their rounded scores. NaN is never selected before a number.

    Raises:
        InputError: wrong shapes or devices, or a rule that does not fit E.
        TypeError: logits or bias of another dtype.

    Communication: none.

    Memory: saves the logits and the experts; the scores are never stored.

    Numerics: float32 inside; sums over tokens are added in an order that depends only on the shape, so that runs agree
        bit for bit, on the CPU with any number of threads. float64 runs on the PyTorch reference. Backward cannot be
        differentiated again (except in float64).

    Paper: DeepSeek-V3, arXiv:2412.19437; z: ST-MoE, arXiv:2202.08906.
    """
    check_dtype("logits", logits, (torch.float32, torch.float64))
    if logits.dim() != 2:
        raise InputError(f"logits.shape={tuple(logits.shape)} must be [tokens, experts]")
    num_rows, num_experts = logits.shape
    rule.check_experts(num_experts)
    check_positive("num_sequences", num_sequences)
    check_divisible("tokens", num_rows, "num_sequences", num_sequences)
    if bias is not None:
        check_dtype("bias", bias, (torch.float32, torch.float64))
        check_shape("bias", bias, (num_experts,))
        check_same_device("bias", bias, "logits", logits)
        bias = bias.detach()
    arguments = (
        rule.num_selected,
        rule.scores == "sigmoid",
        rule.normalize,
        rule.scale,
        rule.num_groups or 1,
        rule.groups_per_token or 1,
        num_sequences,
    )
    if logits.dtype == torch.float64:
        return Routes(*reference.expert_routing_forward(logits, bias, *arguments))
    logits = logits.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    if not is_differentiated():
        return Routes(*_forward(logits, bias, *arguments))
    return Routes(*ExpertRouting.apply(logits, bias, *arguments))
