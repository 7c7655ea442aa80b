"""Start here when `fm.parallelize` changes a model that it refuses, or the numbers of a model that it shards."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.interop import full_tensor
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.testing import run_on_ranks

MLP = {"up": "colwise", "gate": "colwise", "down": "rowwise"}


class Adapter(nn.Module):
    """A wrapper like LoRA's."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


class Block(nn.Module):
    """A flat block: linears and residual in one module; one linear has two names."""

    def __init__(self, width=16, ffn=24):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = self.again = nn.Linear(width, width)
        self.gate, self.up, self.down = nn.Linear(width, ffn), nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, x):
        h = self.norm(self.again(self.first(x)))
        return x + self.down(self.gate(h).sigmoid() * self.up(h))


class TiedLM(nn.Module):
    """An embedding with padding_idx, tied to a head; packed gate and up."""

    def __init__(self, vocab=13, width=8):
        super().__init__()
        self.tokens = nn.Embedding(vocab, width, padding_idx=0)
        self.gate_up, self.down = nn.Linear(width, 24, bias=False), nn.Linear(12, width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids)
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.head(x + self.down(gate.relu() * up))


TIED = {"tokens": "embedding_rowwise", "gate_up": "packed_colwise", "down": "rowwise", "head": "colwise_gather_output"}


class InPlace(nn.Module):
    """Changes outputs of its layers in place, as inplace=True and += do; one matrix for query, key and value."""

    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(16, width), nn.Linear(width, 16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        y = self.down(torch.relu_(self.up(x)))
        y += x
        query, key, value = self.qkv(y).chunk(3, -1)
        z = self.proj((query * key).tanh() * value)
        return z.mul_(2)


IN_PLACE = {"up": "colwise", "down": "rowwise", "qkv": "packed_colwise_3", "proj": "rowwise"}


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)


def adapted():
    block = Block()
    block.up = Adapter(block.up)
    return nn.ModuleDict({"mlp": block})


def both(make, mesh, x, plan=None, call=lambda model, x: model(x), **options):
    """Compare outputs, input gradients and parameter gradients with the original's; return the parallel model."""
    torch.manual_seed(0)
    original = make()
    model = copy.deepcopy(original)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some models have nothing to shard
        fm.parallelize(model, mesh, plan, **options)
    results = []
    for one in (model, original):
        leaf = x.clone().requires_grad_() if x.is_floating_point() else x
        y = call(one, leaf)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        gradients = [p.grad if one is original else full_tensor(p, p.grad, mesh.tp_group) for p in one.parameters()]
        results.append([y, *([leaf.grad] if leaf.requires_grad else []), *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    model.eval(), original.eval()
    with torch.no_grad():  # torch's encoder takes another path here
        torch.testing.assert_close(call(model, x), call(original, x), rtol=1e-4, atol=1e-5)
    return model


def models_not_in_any_table(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(2))
    report = both(encoder, mesh, x).parallel_report
    assert [one.name for one in report.sharded] == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert "layers.{0..1}.self_attn (MultiheadAttention): no pattern of the plan names it" in report.text
    mask = torch.tensor([[False] * 4, [False] * 3 + [True]])
    both(encoder, mesh, x, call=lambda model, x: model(x, src_key_padding_mask=mask)[:, :3])
    attention = both(lambda: nn.MultiheadAttention(16, 2), mesh, x, call=lambda model, x: model(x, x, x)[0])
    assert not attention.parallel_report.sharded
    flat = both(Block, mesh, x, {**MLP, "first": "colwise_gather_output", "again": "colwise_gather_output"})
    assert flat.first is flat.again and "first = again: Linear -> GatheredLinear" in flat.parallel_report.text
    both(Block, mesh, x, MLP)
    both(InPlace, mesh, x, IN_PLACE)
    stack = nn.Sequential
    both(lambda: stack(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), mesh, x, {"0": "colwise", "2": "rowwise"})
    split = {"0": "colwise_gather_output", "2": "rowwise_split_input"}
    both(lambda: stack(nn.Linear(16, 34), nn.GELU(), nn.Linear(34, 16)), mesh, x, split)
    odd = both(lambda: stack(nn.Linear(16, 33)), mesh, x, {"0": "colwise_gather_output"})
    assert odd[0].weight.shape == (17, 16)
    ids = torch.randint(0, 13, (2, 5), generator=torch.Generator().manual_seed(3))
    tied = both(TiedLM, mesh, ids, TIED, strict=True)
    assert tied.tokens.weight is tied.head.weight
    state = fm.full_state_dict(tied)
    assert state["head.weight"] is state["tokens.weight"] and state["head.weight"].shape == (13, 8)
    # The unit of an adapter stays replicated, and the report says why.
    own = adapted()
    own._tp_plan = {f"mlp.{name}": style for name, style in MLP.items()}
    report = both(lambda: copy.deepcopy(own), mesh, x, call=lambda model, x: model.mlp(x)).parallel_report
    reasons = {one.name: one.reason for one in report.left}
    assert not report.sharded and "mlp.up: a Adapter is no plain torch.nn.Linear" in reasons["mlp.down"]
    return report.text


def test_models_not_in_any_table():
    reports = run_on_ranks(models_not_in_any_table, 2, timeout_s=240)
    assert reports[0] == reports[1]


MISTAKES = [
    (Block, MLP | {"gate": "columnwise"}, {}, r"plan\['gate'\]='columnwise' must be one of: 'colwise'"),
    (Block, MLP | {"mlp.up": "colwise"}, {}, r"plan\['mlp.up'\] matches no module .*its modules are: up"),
    (Block, {"up": "colwise"}, {}, "up cannot be 'colwise': colwise without a rowwise layer beside it"),
    (Block, MLP | {"first": "colwise"}, {}, "one module with the names first, again"),
    (lambda: Block(16, 25), MLP, {}, r"gate.weight: out_features=25 must be divisible by tensor_parallel_size=2"),
    (adapted, MLP, {}, r"plan\['up'\]: mlp.up cannot be 'colwise': .*a Adapter is no plain torch.nn.Linear \(merge"),
    (TiedLM, {"head": "colwise_gather_output"}, {}, "its weight is also that of tokens, which stays whole"),
    (
        InPlace,
        IN_PLACE | {"qkv": "colwise"},
        {},
        r"qkv has 48 features where proj takes 16 \('packed_colwise' is",
    ),
    (lambda: InPlace(24), IN_PLACE | {"up": "packed_colwise"}, {}, "up has 24 features where down takes 24"),
    (encoder, None, {"strict": True}, r"strict=True: layers.0.self_attn \(MultiheadAttention\) would stay whole"),
    (encoder, None, {"sequence_parallel": True}, r"layers.0.self_attn \(MultiheadAttention\) stands in a layer"),
    (Block, MLP, {"sequence_parallel": True}, "sequence_parallel=True: no numbered stack of layers"),
    (lambda: nn.Sequential(Block()), MLP, {"sequence_parallel": True}, "blocks of the sequence and the whole at once"),
]


def mistakes(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    for make, plan, options, message in MISTAKES:
        torch.manual_seed(0)
        assert_refused(make(), mesh, plan, message, **options)
    torch.manual_seed(rank)
    assert_refused(Block(), mesh, MLP, r"\w+.weight has other values on other tensor-parallel ranks .*manual_seed")
    assert_refused(Block(16 + 2 * rank), mesh, MLP, r"model on tensor-parallel ranks \[1\] has other parameters")
    theirs = r"ranks \[1\] refused this, and nothing was changed: InputError: gate.weight: out_features=25 must"
    assert_refused(Block(16, 24 + rank), mesh, MLP, "out_features=25" if rank else theirs)
    wrong_mesh = torch.distributed.init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    assert_refused(Block(), wrong_mesh, MLP, r"mesh.mesh_dim_names=\('dp',\) must have 'tp'")
    once = fm.parallelize(encoder_of_one_seed(), mesh)
    assert_refused(once, mesh, None, "model is parallel already")
    with pytest.raises(TypeError, match=r"mesh=str must be what"):
        fm.parallelize(Block(), "tp")
    with pytest.raises(TypeError, match=r"model=dict must be"):
        fm.parallelize({}, mesh)
    right_mesh = torch.distributed.init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    assert len(fm.parallelize(encoder_of_one_seed(), right_mesh, overlap=False).parallel_report.sharded) == 4


def encoder_of_one_seed():
    torch.manual_seed(0)
    return encoder()


def assert_refused(model, mesh, plan, message, **options):
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    attributes = {module: dict(module.__dict__) for module in modules.values()}
    kinds = {module: type(module) for module in modules.values()}
    with pytest.raises(InputError, match=message):
        fm.parallelize(model, mesh, plan, **options)
    assert dict(model.named_modules()) == modules and {m: type(m) for m in model.modules()} == kinds
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(module.__dict__ == attributes[module] for module in model.modules())


def test_mistakes_leave_the_model_as_it_was_on_every_rank():
    run_on_ranks(mistakes, 2, timeout_s=240)


def collectives(rank, world_size):
    """Record the collectives of two linears with one input: one all-reduce in forward, after down, one in backward."""
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    torch.manual_seed(0)
    model = fm.parallelize(Block(), mesh, MLP, overlap=False)
    x = torch.randn(2, 4, 16, requires_grad=True)
    model(x)  # the first call compares the inputs of the ranks
    with record_communication() as ledger:
        model(x).sum().backward()
    return [(one.kind, one.backward, one.elements) for one in ledger.entries]


def test_linears_of_one_input_share_an_all_reduce():
    for entries in run_on_ranks(collectives, 2, timeout_s=240):
        assert entries == [("all_reduce", False, 128), ("all_reduce", True, 128)]
