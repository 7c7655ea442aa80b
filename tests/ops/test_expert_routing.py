"""Start here when a token goes to a wrong expert, or a router gets a wrong probability, balance sum or gradient."""

import functools

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.ops import RoutingRule, route_tokens
from fused_megatron.testing.op_contract import Contract
from fused_megatron.testing.op_gradients import assert_op_matches

NAN, INF = float("nan"), float("inf")
BIAS = torch.randn(400, generator=torch.Generator().manual_seed(7))
CLAUSES = ["strides", "memory", "twice", "empty", "no_grad", "single_gradients", "gradients_of_gradients"]
CPU_CLAUSES = ["opcheck", "compile", "fake_tensors", "threads"]
RULES = {
    "softmax": RoutingRule(3),
    "not normalised": RoutingRule(3, normalize=False, scale=1.5),
    "sigmoid": RoutingRule(3, "sigmoid", scale=2.5),
    "sigmoid in groups": RoutingRule(3, "sigmoid", num_groups=2, groups_per_token=1),
    "softmax in groups": RoutingRule(2, "softmax", normalize=False, num_groups=2, groups_per_token=1),
}


def bias_of(form, num_experts):
    """Return the bias of selection for each second form, or None."""
    if list(RULES).index(form) % 2 == 0:
        return None
    return BIAS[:num_experts]


def routed(form, logits, sequences=1):
    """Return probabilities, sums of scores, and z."""
    bias = bias_of(form, logits.shape[1])
    bias = None if bias is None else bias.to(logits)
    routes = route_tokens(logits, RULES[form], bias=bias, num_sequences=sequences)
    return routes.probabilities, routes.score_sums, routes.z.reshape(1)


def unfused_experts(form, logits):
    """Return the experts, with torch.topk: only for logits without ties."""
    rule, bias = RULES[form], bias_of(form, logits.shape[1])
    scores = logits.sigmoid() if rule.scores == "sigmoid" else logits.softmax(-1)
    value = scores if bias is None else scores + bias.to(logits)
    if rule.num_groups:
        groups = value.unflatten(1, (rule.num_groups, -1))
        chosen = groups.topk(2, -1).values.sum(-1).topk(rule.groups_per_token, -1).indices
        inside = torch.zeros(groups.shape[:2]).to(logits).scatter(1, chosen, 1).unsqueeze(-1)
        value = torch.where(inside > 0, groups, -INF).flatten(1)
    return value.topk(rule.num_selected, -1).indices


def unfused(form, logits, sequences=1):
    rule = RULES[form]
    scores = logits.sigmoid() if rule.scores == "sigmoid" else logits.softmax(-1)
    chosen = scores.gather(1, unfused_experts(form, logits))
    if rule.normalize:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    shares = scores / scores.sum(-1, keepdim=True)
    return rule.scale * chosen, torch.stack([shares[b::sequences].sum(0) for b in range(sequences)]), z_of(logits)


def z_of(logits):
    return logits.logsumexp(-1).square().sum().reshape(1)


def draw(form, shape, dtype, sequences=1):
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    num_selected = RULES[form].num_selected
    dy = [normal(shape[0], num_selected), normal(sequences, shape[1]), normal(1) / max(1, shape[0])]
    return (2 * normal(*shape),), dy


def contract(form):
    named = [functools.partial(f, form) for f in (routed, unfused, draw)]
    return Contract(*named, shape=(12, 52), odd=(3, 6), empty=((0, 8),), wide=(300, 150))


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("form", RULES)
def test_contract(form, clause, device):
    contract(form).check(f"{clause} float32", device)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("clause", CPU_CLAUSES)
def test_contract_on_the_cpu(clause):
    # Without a bias, which is no fake tensor.
    form = "sigmoid" if clause == "fake_tensors" else "sigmoid in groups"
    contract(form).check(f"{clause} float32")


# One token; fewer experts than a vector; widths of each kind of selection; several parts of rows; several sequences.
SHAPES = [(1, 4, 1), (24, 6, 3), (70, 64, 1), (210, 100, 7), (64, 258, 2), (33, 300, 1)]


@pytest.mark.parametrize("rows, num_experts, sequences", SHAPES)
@pytest.mark.parametrize("form", RULES)
def test_values_and_gradients(form, rows, num_experts, sequences, device):
    rule = RULES[form]
    if rule.num_groups and num_experts < 6:
        return
    (logits,), dy = draw(form, (rows, num_experts), torch.float32, sequences)
    logits, dy = logits.to(device), [t.to(device) for t in dy]
    ours, theirs = (functools.partial(f, form, sequences=sequences) for f in (routed, unfused))
    assert_op_matches(ours, theirs, (logits,), dy)
    bias = bias_of(form, num_experts)
    routes = route_tokens(logits, rule, bias=None if bias is None else bias.to(device), num_sequences=sequences)
    experts = unfused_experts(form, logits.double())
    assert torch.equal(routes.experts, experts)
    counts = [torch.bincount(experts[b::sequences].flatten().cpu(), minlength=num_experts) for b in range(sequences)]
    assert torch.equal(routes.counts.cpu(), torch.stack(counts))


@pytest.mark.parametrize("num_experts", [8, 70, 300])
@pytest.mark.parametrize("grouped", [False, True])
def test_ties_go_to_the_lower_index(num_experts, grouped, device):
    rule = RoutingRule(4, num_groups=2, groups_per_token=1) if grouped else RoutingRule(4)
    logits = torch.zeros(2, num_experts, device=device)
    logits[0, 5::2] = -0.0
    logits[1, -3:] = 1.0
    last = num_experts - 3
    assert route_tokens(logits, rule).experts.tolist() == [
        [0, 1, 2, 3],
        [last, last + 1, last + 2, num_experts // 2 if grouped else 0],
    ]


def test_logits_whose_scores_round_to_a_tie_are_ordered(device):
    logits = torch.tensor([[0.0, -200.0, -199.0, -198.0]], device=device)
    assert route_tokens(logits, RoutingRule(3)).experts.tolist() == [[0, 3, 2]]


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_numbers_that_are_not_finite(scores, device):
    """Experts are ids in any case; NaN is selected last, and reaches the probabilities of its token only."""
    logits = torch.tensor(
        [[NAN, 1.0, 2.0, -INF], [NAN] * 4, [-INF] * 4, [1.0, 2.0, 3.0, -INF], [1e4, -1e4, 9e3, 0.0]], device=device
    )
    routes = route_tokens(logits, RoutingRule(3, scores))
    assert routes.experts.tolist() == [[2, 1, 0], [0, 1, 2], [0, 1, 2], [2, 1, 0], [0, 2, 3]]
    assert routes.probabilities[3:].isfinite().all()
    if scores == "softmax":
        assert routes.probabilities[:3].isnan().all()
    else:  # an expert with the logit -inf has the score 0
        assert routes.probabilities[2].tolist() == [0.0, 0.0, 0.0]


def test_large_logits_keep_their_precision(device):
    (logits,), dy = draw("softmax", (20, 16), torch.float32)
    assert_op_matches(
        functools.partial(routed, "softmax"),
        functools.partial(unfused, "softmax"),
        ((logits + 1e4).to(device),),
        [t.to(device) for t in dy],
    )


def test_the_bias_selects_only(device):
    logits = torch.randn(9, 8, generator=torch.Generator().manual_seed(1)).to(device)
    bias = torch.zeros(8, device=device, requires_grad=True)
    plain = route_tokens(logits, RoutingRule(8, "sigmoid"))
    biased = route_tokens(logits, RoutingRule(8, "sigmoid"), bias=bias + 3.0 * torch.arange(8, device=device))
    assert torch.equal(biased.experts, torch.arange(7, -1, -1, device=device).expand(9, 8))
    by_expert = [r.probabilities.gather(1, r.experts.argsort(1)) for r in (plain, biased)]
    torch.testing.assert_close(*by_expert, rtol=1e-6, atol=0)
    assert not biased.probabilities.requires_grad
    assert torch.equal(plain.score_sums, biased.score_sums)


def test_bad_arguments(device):
    logits = torch.zeros(6, 8, device=device)
    with pytest.raises(InputError, match=r"logits.shape=\(8,\) must be \[tokens, experts\]"):
        route_tokens(logits[0], RoutingRule(2))
    with pytest.raises(TypeError, match=r"logits.dtype=bfloat16 must be one of: float32, float64"):
        route_tokens(logits.bfloat16(), RoutingRule(2))
    with pytest.raises(InputError, match=r"num_selected=9 must be at most num_experts, 8"):
        route_tokens(logits, RoutingRule(9))
    with pytest.raises(InputError, match=r"num_selected=3 must be at most .* groups_per_token groups, 2"):
        route_tokens(logits, RoutingRule(3, num_groups=4, groups_per_token=1))
    with pytest.raises(InputError, match=r"num_experts=8 must be divisible by num_groups=3 \(nearest: 6, 9\)"):
        route_tokens(logits, RoutingRule(1, num_groups=3, groups_per_token=1))
    with pytest.raises(InputError, match=r"tokens=6 must be divisible by num_sequences=4"):
        route_tokens(logits, RoutingRule(2), num_sequences=4)
    with pytest.raises(InputError, match=r"bias.shape=\(6,\) must be \(8,\)"):
        route_tokens(logits, RoutingRule(2), bias=logits[:, 0])
    for arguments, message in [
        ({"num_selected": 0}, "num_selected=0 must be 1 or more"),
        ({"num_selected": 1, "scores": "relu"}, "scores='relu' must be one of: 'softmax', 'sigmoid'"),
        ({"num_selected": 1, "num_groups": 2}, "num_groups=2 and groups_per_token=None must be given together"),
        ({"num_selected": 1, "num_groups": 2, "groups_per_token": 3}, "groups_per_token=3 must be at most num_groups"),
    ]:
        with pytest.raises(InputError, match=message):
            RoutingRule(**arguments)
