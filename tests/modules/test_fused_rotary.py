"""Start here when replace_modules changes how attention rotates queries and keys, or does not recognise it."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from fused_megatron.modules import FusedRotary, replace_modules

HEADS, KV_HEADS, HEAD = 4, 2, 6


def turned(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), dim=-1)


def rotate(q, k, cos, sin, unsqueeze_dim=1):
    """The function of Llama's models."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def rotate_pairs(q, k, cos, sin, unsqueeze_dim=1):
    """Almost the same: neighbours are rotated together."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    twist = lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)  # noqa: E731
    return q * cos + twist(q) * sin, k * cos + twist(k) * sin


def keyword(function):
    """A decorator, as transformers has around the forwards of attention modules."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        kwargs.pop("ignored", None)
        return function(*args, **kwargs)

    return wrapped


class Tables(nn.Module):
    """Makes cos and sin as Llama's models do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", 10.0 ** -torch.arange(HEAD // 2), persistent=False)

    def forward(self, x, position_ids):
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class RepeatedTables(Tables):
    def forward(self, x, position_ids):
        angles = (position_ids[..., None].float() * self.inv_freq).repeat_interleave(2, -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, HEADS * HEAD)
        self.k_proj = nn.Linear(8, KV_HEADS * HEAD)

    @keyword
    def forward(self, x, tables):
        q = self.q_proj(x).view(*x.shape[:-1], -1, HEAD).transpose(1, 2)
        k = self.k_proj(x).view(*x.shape[:-1], -1, HEAD).transpose(1, 2)
        return rotate(q, k, *tables)


class PairedAttention(Attention):
    def forward(self, x, tables):
        q = self.q_proj(x).view(*x.shape[:-1], -1, HEAD).transpose(1, 2)
        return rotate_pairs(q, q, *tables)


class Model(nn.Module):
    def __init__(self, attention=Attention, tables=Tables):
        super().__init__()
        self.attention, self.tables = attention(), tables()

    def forward(self, x, position_ids, **more):
        return self.attention(x, self.tables(x, position_ids), **more)


def results_of(model, x, position_ids, upstream):
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    q, k = model(leaf, position_ids)
    torch.autograd.backward((q, k), upstream)
    return [q.detach(), k.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("own_positions", [False, True])
def test_replaced_attention_computes_the_same(own_positions, dtype):
    torch.manual_seed(0)
    model = Model().to(dtype)
    twin = copy.deepcopy(model)
    report = replace_modules(model)
    assert [str(one.now) for one in report.replaced] == ["Attention with fused rotary embedding"]
    assert isinstance(model.attention, FusedRotary) and isinstance(model.attention, Attention)
    assert not isinstance(twin.attention, FusedRotary) and Attention.forward.__wrapped__.__globals__["rotate"] is rotate
    x = torch.randn(2, 9, 8).to(dtype)
    positions = torch.stack([torch.arange(9), torch.arange(9).flip(0)]) if own_positions else torch.arange(9)[None]
    upstream = (torch.randn(2, HEADS, 9, HEAD).to(dtype), torch.randn(2, KV_HEADS, 9, HEAD).to(dtype))
    exact = results_of(copy.deepcopy(twin).double(), x.double(), positions, [one.double() for one in upstream])
    theirs = results_of(twin, x, positions, upstream)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(one.attention, FusedRotary) and type(one.attention).__name__ == "Attention"
        for a, b, true in zip(results_of(one, x, positions, upstream), theirs, exact, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert (a.double() - true).norm() <= 2 * (b.double() - true).norm() + 1e-6 * true.norm()


def test_the_fused_op_runs(monkeypatch):
    model, calls = Model(), []
    replace_modules(model)
    monkeypatch.setattr("fused_megatron.ops.rotary_embedding", lambda *a, **k: calls.append(1) or (a[0], a[1]))
    model(torch.randn(1, 3, 8), torch.arange(3)[None], ignored=1)
    assert calls == [1]


def test_tables_in_float32_promote_as_before():
    model = Model().bfloat16()
    twin = copy.deepcopy(model)
    replace_modules(model)
    x, angles = torch.randn(1, 4, 8).bfloat16(), torch.randn(1, 4, HEAD // 2).repeat(1, 1, 2)
    ours, theirs = (one.attention(x, (angles.cos(), angles.sin())) for one in (model, twin))
    assert ours[0].dtype == theirs[0].dtype == torch.float32
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize(
    ("attention", "tables", "reason"),
    [
        (PairedAttention, Tables, "its rotary embedding is not the fused one"),
        (Attention, RepeatedTables, "no module makes its cos and sin with the same angles in both halves"),
        (Attention, nn.Identity, "no module makes its cos and sin"),
    ],
)
def test_left_and_named(attention, tables, reason):
    model = Model(attention, tables)
    (left,) = replace_modules(model).left
    assert type(model.attention) is attention and left.name == "attention" and reason in left.reason


def test_compiled():
    model = Model()
    twin = copy.deepcopy(model)
    replace_modules(model)
    x, positions = torch.randn(2, 5, 8), torch.arange(5)[None]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(x, positions), twin(x, positions), strict=True):
        torch.testing.assert_close(a, b)
