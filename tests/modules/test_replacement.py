"""Start here when `fm.replace_modules` changes what a model computes, or leaves a module and gives no reason."""

import copy

import pytest
import torch
from torch import nn

from fused_megatron import modules
from fused_megatron.modules import replace_modules, replacement


class LikeLlama(nn.Module):
    """An RMS norm as in Llama's models, under another name."""

    def __init__(self, width, eps=1e-3):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class ZeroCentred(nn.Module):
    """An RMS norm as in Gemma. With its initial weights, zeros, it equals Llama's with ones."""

    def __init__(self, width, eps=1e-3):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x):
        normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (normal * (1.0 + self.weight.float())).type_as(x)


class EpsOutside(LikeLlama):
    """Almost an RMS norm: eps is added to the root."""

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class MeanTaken(LikeLlama):
    """A layer norm without bias, as in Cohere's models."""

    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class GatedRMSNorm(LikeLlama):
    """An RMS norm as in Mamba: equal if no gate is given."""

    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * gate)


class Loud(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def model_of(*parts):
    torch.manual_seed(0)
    model = nn.Sequential(*parts)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: nn.LayerNorm(6), lambda: nn.RMSNorm(6), nn.GELU, lambda: LikeLlama(6), lambda: ZeroCentred(6)],
    ids=["LayerNorm", "RMSNorm", "GELU", "LikeLlama", "ZeroCentred"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_replaced_model_computes_the_same(make, dtype):
    model = model_of(nn.Linear(4, 6), make(), nn.Linear(6, 3)).to(dtype)
    twin = copy.deepcopy(model)
    report = replace_modules(model)
    assert [one.name for one in report.replaced] == ["1"] and not report.left
    assert type(model[1]).__module__.startswith("fused_megatron")
    x, results = torch.randn(5, 4, dtype=dtype), []
    dy = torch.randn(5, 3, dtype=dtype)
    for one in (model, twin):
        leaf = x.clone().requires_grad_()
        y = one(leaf)
        y.backward(dy)
        results.append([y, leaf.grad, *(p.grad for p in one.parameters())])
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("make", [LikeLlama, ZeroCentred])
def test_dtype_of_the_result_is_kept(make):
    """Llama's norm returns the common dtype of x and weight, Gemma's the dtype of x."""
    norm = make(6)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    before = norm(x)
    replace_modules(norm)
    after = norm(x)
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)


def test_everything_but_the_class_is_kept():
    shared = nn.LayerNorm(4)
    model = model_of(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared).eval()
    called = []
    shared.register_forward_hook(lambda *_: called.append(1))
    shared.weight.requires_grad_(False)
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    report = replace_modules(model)
    assert [one.name for one in report.replaced] == ["1 = 3"]
    assert model[1] is model[3] is shared and type(shared) is modules.LayerNorm and not shared.training
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == keys and not shared.weight.requires_grad
    model(torch.randn(2, 4))
    assert called == [1, 1]
    assert isinstance(shared, nn.LayerNorm)


def test_the_model_itself_and_the_loss():
    norm, loss = nn.LayerNorm(4), nn.CrossEntropyLoss(ignore_index=3)
    assert replace_modules(norm).replaced[0].name == "LayerNorm" and type(norm) is modules.LayerNorm
    replace_modules(loss)
    assert type(loss) is modules.CrossEntropyLoss and loss.ignore_index == 3


def test_meta_device_and_tracing_hooks():
    with torch.device("meta"):
        model = nn.Sequential(LikeLlama(6), nn.LayerNorm(6))
        report = replace_modules(model)
    assert len(report.replaced) == 2 and all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Loud(6), "a subclass of LayerNorm, with methods of its own"),
        (EpsOutside(6), "its result is not weight"),
        (MeanTaken(6), "its result is not weight"),
        (GatedRMSNorm(6), "its forward takes more than x: x, gate"),
        (nn.CrossEntropyLoss(torch.ones(3)), "class weights have no fused kernel"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_left_and_named(module, reason):
    model, kind = nn.Sequential(module, nn.Linear(2, 2)), type(module)
    report = replace_modules(model)
    (left,) = report.left
    assert left.name == "0" and left.kind == kind.__name__ and reason in left.reason
    assert type(module) is kind and not report.replaced
    assert f"0 ({kind.__name__}): {left.reason}" in str(report) and "1 Linear" in str(report)


def test_wrapped_forward_is_left():
    norm = nn.LayerNorm(4)
    norm.forward = lambda x: x
    report = replace_modules(nn.Sequential(norm))
    assert "its forward was replaced" in report.left[0].reason and type(norm) is nn.LayerNorm


def test_failure_leaves_the_model_untouched(monkeypatch):
    model = model_of(nn.LayerNorm(4), LikeLlama(4), nn.GELU())
    kinds = [type(m) for m in model]
    made = []

    class Stubborn(replacement.Exchange):
        def make(self):
            if len(made) == 2:
                raise RuntimeError("no")
            made.append(self)
            return super().make()

    monkeypatch.setattr(replacement, "Exchange", Stubborn)
    with pytest.raises(RuntimeError, match="no"):
        replace_modules(model)
    assert [type(m) for m in model] == kinds and "adopted_eps" not in model[1].__dict__
    with pytest.raises(TypeError, match=r"model=int must be a torch.nn.Module"):
        replace_modules(3)


def test_second_time_changes_nothing():
    model = model_of(nn.LayerNorm(4), LikeLlama(4), nn.GELU())
    assert len(replace_modules(model).replaced) == 3
    again = replace_modules(model)
    assert not again.replaced and not again.left


def test_pieces_of_torch_models():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    x = torch.randn(2, 3, 8)
    before = model(x)
    assert len(replace_modules(model).replaced) == 4
    torch.testing.assert_close(model(x), before)
    model.eval()  # torch's fast path reads weight and eps of the norms
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
