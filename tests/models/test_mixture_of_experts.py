"""Start here when a block with experts computes other outputs, auxiliary losses or loads than a plain loop."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.config import GPTConfig
from fused_megatron.mesh import ParallelLayout, init_mesh
from fused_megatron.models import GPT, BatchSlice, MixtureOfExperts, mixture_of_experts
from fused_megatron.models.block import reset_layers
from fused_megatron.models.expert_loads import ExpertLoads
from fused_megatron.modules.auxiliary_loss import WithAuxiliaryLoss, split_auxiliary_loss
from fused_megatron.sharding import SequencePartition
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks

S, B, H, E, K = 7, 3, 16, 4, 2
CONFIG = GPTConfig(
    num_layers=2,
    hidden_size=H,
    num_heads=2,
    seq_len=12,
    vocab_size=31,
    ffn_hidden_size=20,
    init_std=0.3,
    num_experts=E,
    experts_per_token=K,
    balance_loss=0.1,
    router_z_loss=0.01,
)
GATED = {"activation": "swiglu", "linear_biases": False, "num_shared_experts": 1, "shared_expert_gate": True}
FORMS: dict[str, dict[str, Any]] = {
    "biases": {},
    "gated": GATED,
    "capacity": {**GATED, "capacity_factor": 0.75},
    "sigmoid": {"activation": "geglu", "router_scores": "sigmoid", "router_scale": 2.0, "router_normalize": False},
}


def layer_of(config: GPTConfig, layout: ParallelLayout | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """Return the layer, with biases that are not 0."""
    layer = MixtureOfExperts(config, layout=layout or ParallelLayout(), dtype=dtype)
    reset_layers(layer, 3)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 1 and layout is None:
                parameter += torch.linspace(-1, 1, len(parameter), dtype=dtype) * (1 + len(name) % 3)
    return layer


def input_of(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(S, B, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def activated(config: GPTConfig, h: torch.Tensor) -> torch.Tensor:
    if config.activation == "gelu":
        return F.gelu(h, approximate="tanh")
    gate, up = h.chunk(2, dim=-1)
    return (F.silu(gate) if config.activation == "swiglu" else F.gelu(gate, approximate="tanh")) * up


def plain(config: GPTConfig, layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the layer token by token: return y, the auxiliary loss, and the tokens of each expert."""
    weights = dict(layer.named_parameters())
    expansion = weights["experts.expansion_weight"].chunk(E)
    projection = weights["experts.projection_weight"].chunk(E)
    biases = [
        weights[f"experts.{name}_bias"].chunk(E) if config.linear_biases else None
        for name in ("expansion", "projection")
    ]
    logits = x @ weights["router.weight"].t()
    scores = logits.softmax(-1) if config.router_scores == "softmax" else logits.sigmoid()
    shares = scores / scores.sum(-1, keepdim=True)
    rows: list[list[torch.Tensor]] = [[x.new_zeros(H) for _ in range(B)] for _ in range(S)]
    loads = torch.zeros(B, E, dtype=torch.int64)
    taken = torch.zeros(B, E, dtype=torch.int64)
    slots = config.slots(S)
    for s in range(S):
        for b in range(B):
            best = scores[s, b].topk(K)
            total = best.values.sum() if config.router_normalize else 1.0
            for expert, score in zip(best.indices.tolist(), best.values / total * config.router_scale, strict=True):
                loads[b, expert] += 1
                taken[b, expert] += 1
                if slots is not None and taken[b, expert] > slots:
                    continue
                first = None if biases[0] is None else biases[0][expert]
                second = None if biases[1] is None else biases[1][expert]
                h = activated(config, F.linear(x[s, b], expansion[expert], first))
                rows[s][b] = rows[s][b] + score * F.linear(h, projection[expert], second)
    y = torch.stack([torch.stack(row) for row in rows])
    if config.num_shared_experts:
        h = activated(config, x @ weights["shared.expansion.weight"].t())
        y = y + (x @ weights["shared_gate.weight"].t()).sigmoid() * (h @ weights["shared.projection.weight"].t())
    balance = E / (K * S) * (loads * shares.sum(0)).sum()
    z = logits.logsumexp(-1).square().sum()
    return y, config.balance_loss * balance + config.router_z_loss * z, loads.sum(0)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_losses_and_gradients_are_those_of_a_plain_loop(form: str) -> None:
    config = replace(CONFIG, **FORMS[form])
    layer = layer_of(config)
    found: list[Any] = []
    for compute in (plain, lambda config, layer, x: layer(x)):
        x = input_of().requires_grad_()
        layer.zero_grad()
        returned = compute(config, layer, x)
        if isinstance(returned, WithAuxiliaryLoss):
            returned = (returned.output[0], returned.auxiliary_loss, returned.report[:E])
        y, auxiliary, loads = returned
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
        ((y * upstream).sum() + 0.7 * auxiliary).backward()
        gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
        found.append([y.detach(), auxiliary.detach(), loads.double(), x.grad, *gradients.values()])
    for wanted, computed in zip(*found, strict=True):
        # Probabilities are float32 in every dtype.
        torch.testing.assert_close(computed, wanted, rtol=1e-5, atol=1e-5)
    assert (found[0][2] > 0).all()


def test_fixed_slots_for_devices_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(replace(CONFIG, **FORMS["capacity"]))
    found: list[list[torch.Tensor]] = []
    for waits in (False, True):
        monkeypatch.setattr(mixture_of_experts, "host_waits_for", lambda x, waits=waits: waits)
        x = input_of().requires_grad_()
        layer.zero_grad()
        returned = layer(x)
        (returned.output[0].sin().sum() + returned.auxiliary_loss).backward()
        found.append([returned.output[0], returned.report, x.grad, *(p.grad for p in layer.parameters())])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_evaluation_has_no_loss_and_counts_no_loads() -> None:
    model = GPT(CONFIG, seed=1)
    tokens = torch.arange(24).view(2, 12) % 31
    trained, loss = split_auxiliary_loss(model(tokens, tokens))
    assert loss is not None and loss > 0
    sums = [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("sums")]
    assert [int(each[:E].sum()) for each in sums] == [2 * 12 * K] * 2
    with torch.no_grad():
        model(tokens, tokens)
    evaluated = model.eval()(tokens, tokens)
    assert torch.equal(evaluated, trained)
    again = [buffer for name, buffer in model.named_buffers() if name.endswith("sums")]
    assert all(map(torch.equal, sums, again))


@pytest.mark.parametrize("more", [{}, {"router_jitter": 0.3, "hidden_dropout": 0.2, "capacity_factor": 1.0}], ids=str)
def test_recomputed_blocks_take_the_same_routes_and_count_once(more: dict[str, Any]) -> None:
    found = []
    tokens = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(3))
    for recompute in ("none", "full"):
        model = GPT(replace(CONFIG, recompute=recompute, **more), seed=1)
        loss, auxiliary = split_auxiliary_loss(model(tokens, tokens, reduction="sum", batch_slice=BatchSlice(0, 0, 2)))
        (loss + auxiliary).backward()
        found.append([loss, *(p.grad for p in model.parameters()), *(b for _, b in model.named_buffers())])
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))


def test_the_step_form_counts_the_loads_of_the_step_before() -> None:
    config = replace(CONFIG, num_layers=1, balance_loss_over="step", router_z_loss=0.0, router_bias_rate=0.5)
    model = GPT(config, seed=1)
    tokens = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(3))
    loads = ExpertLoads(config, [model])
    # Nothing is known before the first step: every expert counts the same, and the loss is 1 a token.
    assert model(tokens).auxiliary_loss.item() == pytest.approx(0.1 * 24, rel=1e-6)
    totals = loads.of_rank(torch.device("cpu"))
    assert totals[0, :E].sum() == 24 * K
    totals[0, :E] = torch.tensor([48.0, 24.0, 12.0, 12.0])
    loads.update(totals)
    router = model.blocks["0"].mlp.router
    assert router.selection_bias.tolist() == [-0.5, 0.0, 0.5, 0.5]  # the mean is 24
    seen: list[torch.Tensor] = []
    router.register_forward_hook(lambda module, arguments, routes: seen.append(routes.score_sums.sum(0).double()))
    auxiliary = model(tokens).auxiliary_loss
    share = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    torch.testing.assert_close(auxiliary, 0.1 * E * (share * seen[0]).sum())


def in_parts(rank: int, world_size: int, form: dict[str, Any], sizes: dict[str, int], sequence_parallel: bool) -> Any:
    """Return this rank's output, report and gradients of a layer, and the positions of its tokens."""
    mesh = init_mesh(**sizes)
    layout = mesh.layout(sequence_parallel=sequence_parallel)
    partition = SequencePartition.contiguous(S + sequence_parallel, mesh.cp_size)
    own = partition.layouts[mesh.cp_rank]
    layer = layer_of(replace(CONFIG, **form), layout)
    x = own.take(torch.cat([input_of(), input_of()[:1]])).requires_grad_()
    given = x.chunk(mesh.tp_size)[mesh.tp_rank] if sequence_parallel else x
    returned = layer(given, partition=partition if mesh.cp_size > 1 else None)
    upstream = own.take(torch.sin(torch.arange(8 * B * H, dtype=torch.float64)).view(8, B, H))
    upstream = upstream.chunk(mesh.tp_size)[mesh.tp_rank] if sequence_parallel else upstream
    ((returned.output[0] * upstream).sum() + returned.auxiliary_loss).backward()
    return (
        mesh.cp_rank,
        mesh.tp_rank,
        returned.output[0].detach(),
        float(returned.auxiliary_loss),
        returned.report,
        x.grad,
        layer.router.weight.grad,
    )


@pytest.mark.parametrize(
    "form", [{**GATED, "capacity_factor": 1.0}, {"balance_loss_over": "step"}], ids=["capacity", "step"]
)
def test_ranks_that_share_sequences_compute_as_one(form: dict[str, Any]) -> None:
    # 7 positions: blocks of 4 and 3, and of 2, 2, 2 and 1.
    layouts = [
        ({"tensor_parallel_size": 4, "expert_parallel_size": 2}, False),
        ({"tensor_parallel_size": 2, "context_parallel_size": 2, "expert_parallel_size": 4}, False),
        ({"tensor_parallel_size": 4, "expert_parallel_size": 2, "expert_tensor_parallel_size": 2}, True),
    ]
    cases = [(form, *layout) for layout in layouts]
    for (_, sizes, sequence_parallel), ranks in zip(cases, run_cases_on_ranks(in_parts, 4, cases), strict=True):
        ((_, _, y, auxiliary, report, dx, dweight),) = run_cases_on_ranks(in_parts, 1, [(form, {}, sequence_parallel)])[
            0
        ]
        cp_size, tp_size = sizes.get("context_parallel_size", 1), sizes["tensor_parallel_size"]
        columns = range(tp_size) if sequence_parallel else range(1)
        parts = {(cp, tp): rest for cp, tp, *rest in ranks}
        found = torch.cat([parts[cp, tp][0] for cp in range(cp_size) for tp in columns])
        torch.testing.assert_close(found, y, rtol=1e-6, atol=1e-6)
        for cp in range(cp_size):  # the same on every tensor-parallel rank
            assert len({parts[cp, tp][1] for tp in range(tp_size)}) == 1
        assert sum(parts[cp, 0][1] for cp in range(cp_size)) == pytest.approx(auxiliary, rel=1e-6)
        torch.testing.assert_close(sum(rest[2] for rest in parts.values()), report, rtol=1e-6, atol=1e-9)
        grads = [sum(parts[cp, tp][3] for tp in columns) for cp in range(cp_size)]
        torch.testing.assert_close(torch.cat(grads), dx, rtol=1e-5, atol=1e-5)
        for tp in range(tp_size):
            summed = sum(parts[cp, tp][4] for cp in range(cp_size))
            torch.testing.assert_close(summed, dweight, rtol=1e-5, atol=1e-5)
