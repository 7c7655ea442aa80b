"""Start here when a router loses precision, or its noise or its buffers depend on the layout or the dtype."""

from dataclasses import replace

import torch

from fused_megatron.config import GPTConfig
from fused_megatron.models import GPT, BatchSlice
from fused_megatron.models.dropout import DropoutMasks
from fused_megatron.models.router import ExpertRouter, float32_product
from fused_megatron.sharding import SequenceLayout

CONFIG = GPTConfig(
    hidden_size=64,
    num_heads=2,
    seq_len=8,
    vocab_size=31,
    init_std=0.3,
    num_experts=16,
    router_jitter=0.2,
    router_bias_rate=0.1,
    balance_loss=0.1,
    balance_loss_over="step",
)


def router_of(dtype: torch.dtype) -> ExpertRouter:
    router = ExpertRouter(CONFIG, tp_group=None, dtype=dtype)
    router.reset_parameters(3, "router.weight")
    return router


def test_bfloat16_tokens_are_routed_in_float32() -> None:
    router = router_of(torch.bfloat16)
    x = torch.randn(40, 5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    routes = router(x)
    exact = x.flatten(0, 1).double() @ router.weight.double().t()
    wanted = exact.topk(2)
    # Of 200 tokens some are so near a tie that bfloat16 logits would select other experts.
    rounded = (x.flatten(0, 1) @ router.weight.t()).topk(2).indices
    assert not torch.equal(rounded, wanted.indices)
    assert torch.equal(routes.experts, wanted.indices)
    probabilities = exact.softmax(-1).gather(1, wanted.indices)
    probabilities /= probabilities.sum(1, keepdim=True)
    torch.testing.assert_close(routes.probabilities.double(), probabilities, rtol=1e-5, atol=0)


def test_the_product_keeps_bfloat16_operands_and_sums_gradients_in_float32() -> None:
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        y = float32_product(x, weight)
    assert y.dtype == torch.float32 and set(saved) == {torch.bfloat16}
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(dy)
    for found, wanted in ((x.grad, dy.double() @ weight.double()), (weight.grad, dy.double().t() @ x.double())):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-4)  # one rounding


def test_noise_depends_on_the_token_only() -> None:
    router = router_of(torch.float32)
    states = torch.tensor([[9, 4]])
    shape = torch.Size((8, 4, 64))
    whole = router.noise(
        DropoutMasks(states, BatchSlice(4, 0, 4), SequenceLayout.whole(8)), 0, SequenceLayout.whole(8), shape
    )
    assert 0.79 < whole.min() < 0.81 and 1.19 < whole.max() < 1.21 and abs(whole.mean() - 1) < 0.01
    part = SequenceLayout(8, ((1, 3), (6, 7)))
    masks = DropoutMasks(states, BatchSlice(4, 1, 4), part)
    assert torch.equal(router.noise(masks, 0, part, torch.Size((3, 2, 64))), whole[[1, 2, 6], 1:3])
    other = DropoutMasks(torch.tensor([[9, 5]]), BatchSlice(5, 0, 4), SequenceLayout.whole(8))
    assert not torch.equal(router.noise(other, 0, SequenceLayout.whole(8), shape), whole)


def test_buffers_stay_exact_when_the_model_is_converted() -> None:
    model = GPT(replace(CONFIG, num_layers=1), seed=1)
    router = model.blocks["0"].mlp.router
    router.sums += 2**40 + 1.0
    router.selection_bias += 1 / 3
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    assert before.keys() == {"selection_bias", "previous_load", "sums"}
    model.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    for name, buffer in router.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    assert {name.rpartition(".")[2] for name in model.state_dict() if ".router." in name} == {
        "weight",
        "selection_bias",
        "previous_load",
    }
