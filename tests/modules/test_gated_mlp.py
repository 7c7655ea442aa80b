"""Start here when replace_modules changes what an MLP with a gate computes, or does not recognise one."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_megatron.modules import GatedMLP, replace_modules

WIDTH, FFN = 6, 10


class Gated(nn.Module):
    """An MLP as in Llama's models, under other names."""

    activation = staticmethod(F.silu)

    def __init__(self, bias=False):
        super().__init__()
        self.w1, self.w3 = nn.Linear(WIDTH, FFN, bias), nn.Linear(WIDTH, FFN, bias)
        self.w2 = nn.Linear(FFN, WIDTH, bias)

    def forward(self, x):
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


class UpFirst(Gated):
    """The gate is the second linear, as in T5, with the GELU of Gemma."""

    def forward(self, hidden_states):
        return self.w2(self.w1(hidden_states) * F.gelu(self.w3(hidden_states), approximate="tanh"))


class ExactGELU(Gated):
    activation = staticmethod(F.gelu)


class Packed(nn.Module):
    """Gate and up are one linear, as in Phi-3."""

    def __init__(self, bias=False):
        super().__init__()
        self.gate_up, self.down, self.act = nn.Linear(WIDTH, 2 * FFN, bias), nn.Linear(FFN, WIDTH, bias), nn.SiLU()

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(up * self.act(gate))


class PackedUpFirst(Packed):
    def forward(self, x):
        up, gate = self.gate_up(x).chunk(2, -1)
        return self.down(up * self.act(gate))


class ReLUGate(Gated):
    activation = staticmethod(F.relu)


class Residual(Gated):
    def forward(self, x):
        return x + super().forward(x)


class Masked(Gated):
    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


class Dropped(Gated):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def results_of(model, x, dy):
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    model.zero_grad()
    y.backward(dy)
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())]


def compare(model, twin, dtype=torch.float32):
    torch.manual_seed(3)
    x, dy = torch.randn(4, 16, WIDTH).to(dtype), torch.randn(4, 16, WIDTH).to(dtype)
    exact = results_of(copy.deepcopy(twin).double(), x.double(), dy.double())
    for a, b, true in zip(results_of(model, x, dy), results_of(twin, x, dy), exact, strict=True):
        assert a.dtype == b.dtype == dtype
        assert (a.double() - true).norm() <= 2 * (b.double() - true).norm() + 1e-6 * true.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [Gated, UpFirst, ExactGELU, Packed])
def test_replaced_mlp_computes_the_same(kind, dtype, bias):
    torch.manual_seed(0)
    model = nn.Sequential(kind(bias)).to(dtype)
    twin = copy.deepcopy(model)
    before, names = dict(model.named_parameters()), list(model.state_dict())
    report = replace_modules(model)
    assert [(one.name, one.was, one.now) for one in report.replaced] == [("0", kind.__name__, "GatedMLP")]
    assert isinstance(model[0], GatedMLP) and isinstance(model[0], kind) and list(model.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    compare(model, twin, dtype)
    compare(copy.deepcopy(model), twin, dtype)
    compare(pickle.loads(pickle.dumps(model)), twin, dtype)


def test_gate_and_up_are_one_product():
    model = Gated()
    replace_modules(model)
    gate, up = model.w1.weight, model.w3.weight
    assert up.data_ptr() == gate.data_ptr() + gate.nbytes
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert up.data_ptr() == gate.data_ptr() + gate.nbytes
    frozen = Gated()
    frozen.w1.weight = nn.Parameter(frozen.w1.weight.detach().bfloat16())
    replace_modules(frozen)
    assert frozen.w1.weight.dtype == torch.bfloat16


def test_less_is_saved_for_backward():
    model, x = Gated(), torch.randn(50, WIDTH)

    def saved():
        found = {}

        def keep(tensor):
            found[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(x)
        return sum(size for size in found.values() if size >= 50 * FFN)

    before = saved()
    replace_modules(model)
    assert before == 4 * 50 * FFN and saved() == 3 * 50 * FFN


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (ReLUGate(), "its result is not down(activation(gate(x)) * up(x))"),
        (Residual(), "its result is not down"),
        (PackedUpFirst(), "its result is not down"),
        (Masked(), "its forward takes more than x: x, mask"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_left_and_named(module, reason):
    kind = type(module)
    (left,) = replace_modules(nn.Sequential(module)).left
    assert type(module) is kind and left.kind == kind.__name__ and reason in left.reason


class SelfAttention(nn.Module):
    """Query, key and value, as in BERT."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, mask):
        return self.query(x) * self.key(x) + self.value(x)


def test_other_modules_are_not_even_named():
    two = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 8))
    report = replace_modules(nn.Sequential(SelfAttention()))
    assert not report.left
    report = replace_modules(nn.Sequential(two, Dropped()))
    assert not report.replaced and [type(m) for m in two] == [nn.Linear] * 3


def test_linears_that_are_more_than_a_product_run_as_they_are():
    model = Gated()
    twin = copy.deepcopy(model)
    replace_modules(model)
    calls = []
    model.w1.register_forward_hook(lambda *_: calls.append(1))
    compare(model, twin)
    assert calls
    for one in (model, twin):
        one.w3 = nn.Sequential(one.w3, nn.Tanh())
    compare(model, twin)


def test_another_activation_counts():
    """Something replaces the activation after replace_modules, or asks for it by a hook."""
    model = Packed()
    twin = copy.deepcopy(model)
    replace_modules(model)
    compare(model, twin)
    calls = []
    model.act.register_forward_hook(lambda *_: calls.append(1))
    compare(model, twin)
    assert len(calls) == 1
    for one in (model, twin):
        one.act = nn.ReLU()
    compare(model, twin)


def test_compiled_autocast_and_checkpointed():
    model = Gated(bias=True)
    twin = copy.deepcopy(model)
    replace_modules(model)
    x = torch.randn(3, WIDTH)
    expected = twin(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(x), twin(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    leaf = x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(model, leaf, use_reentrant=False).sum().backward()
    twin(x).sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
