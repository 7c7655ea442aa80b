"""Start here when a parameter between sharded layers differs between ranks, or a forward fails only in shards."""

import copy

import pytest
import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it
from torch import nn

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.interop import full_tensor
from fused_megatron.testing import run_on_ranks

WIDTH, FFN = 8, 12
MLP = {"up": "colwise", "down": "rowwise"}


class Swish(nn.Module):
    """Swish with a learned slope."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


class MLPOf(nn.Module):
    """up, something, down; and parameters before and after them, whose gradients need no sum."""

    def __init__(self, between, gate=None):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)
        self.between, self.gate = between, gate
        self.temperature, self.layer_scale = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x):
        h = self.norm(x)
        y = self.between(self.up(h) * self.temperature)
        if self.gate is not None:
            y = y * self.gate(h).sigmoid()
        return x + self.layer_scale * self.down(y)


class Stack(nn.Module):
    """Blocks, with a module of their own or a shared one in between; `strange`: why the trial cannot run the model."""

    def __init__(self, make, shared=None, strange="", after=None):
        super().__init__()
        self.shared = shared
        self.blocks = nn.ModuleList(MLPOf(shared or make()) for _ in range(3))
        self.after, self.strange = after, strange

    def forward(self, x, marks=None):
        if self.strange == "call" and marks != "known":
            raise TypeError("marks")
        while self.strange == "loop" and (x != x).any():  # without values, the answer is always True
            pass
        for block in self.blocks:
            x = block(x)
        return x if self.after is None else self.after(x)


class HeadNorm(nn.Module):
    """A norm of single heads with 3 features."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 0.5]))

    def forward(self, x):
        return (nn.functional.normalize(x.unflatten(-1, (-1, 3)), dim=-1) * self.weight).flatten(-2)


class SwishOfADict(nn.Module):
    """Swish with a learned slope that another module holds; the forward of that module never runs."""

    def __init__(self):
        super().__init__()
        self.slopes = nn.ParameterDict({"beta": nn.Parameter(torch.tensor(0.7))})

    def forward(self, x):
        return x * torch.sigmoid(self.slopes["beta"] * x)


def in_place():
    return nn.Sequential(nn.PReLU(), nn.ReLU(inplace=True), nn.PReLU())


# Models that are sharded.
TAKEN = {
    "slope": lambda: Stack(Swish),
    "slope in a dict": lambda: Stack(SwishOfADict),
    "slope in a dict, shared by all layers": lambda: Stack(None, shared=SwishOfADict()),
    "PReLU of a number, and in place": lambda: Stack(in_place),
    "shared by all layers": lambda: Stack(None, shared=Swish()),
    "single heads": lambda: Stack(HeadNorm),
    "unknown arguments": lambda: Stack(Swish, strange="call"),
    "a loop that ends by values": lambda: Stack(Swish, strange="loop"),
}
# Models that would be wrong in shards, or would fail in the first forward.
REFUSED = {
    "PReLU of all features": (lambda: Stack(lambda: nn.PReLU(FFN)), r"in shards blocks.0.between fails: RuntimeError"),
    "a norm of all features": (lambda: Stack(lambda: nn.LayerNorm(FFN)), "in shards blocks.0.between fails"),
    "no parameters": (lambda: Stack(lambda: nn.LayerNorm(FFN, elementwise_affine=False)), "blocks.0.between fails"),
    "a whole gate": (
        lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), MLPOf(nn.GELU(), nn.Linear(WIDTH, 1))),
        "1.down takes what is made of whole activations, and not of shards only",
    ),
    "between and elsewhere": (
        lambda: Stack(None, shared=(one := Swish()), after=one),
        "shared.beta is used between its layers and elsewhere",
    ),
}


def trained(model, tp_group):
    """Return the output and the full gradients after two steps."""
    x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(2))
    keywords = {"marks": "known"} if getattr(model, "strange", "") else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = model(x, **keywords)
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
        optimizer.step()
    return [output.detach(), *(full_tensor(p, p.grad, tp_group) for p in model.parameters())]


def taken(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    for name, make in TAKEN.items():
        torch.manual_seed(0)
        original = make()
        model = fm.parallelize(copy.deepcopy(original), mesh, MLP)
        assert len(model.parallel_report.sharded) == 6, name
        assert "its gradient summed over the ranks" in model.parallel_report.text, name
        for a, b in zip(trained(model, mesh.tp_group), trained(original, None), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert not any("beta" in module.__dict__ for module in model.modules())
        twin = copy.deepcopy(model)
        assert torch.equal(trained(twin, mesh.tp_group)[0], trained(model, mesh.tp_group)[0])


def test_gradients_between_columns_and_rows_are_summed():
    run_on_ranks(taken, 2)


def refused(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    for name, (make, message) in REFUSED.items():
        torch.manual_seed(0)
        model = make()
        state = torch.get_rng_state()
        before = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
        with pytest.raises(InputError, match=rf"plan\[.*cannot be '(col|row)wise': .*{message}"):
            fm.parallelize(model, mesh, MLP)
        after = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
        assert before == after and torch.equal(state, torch.get_rng_state()), name


def test_a_model_that_fails_or_is_wrong_in_shards_is_refused_and_unchanged():
    run_on_ranks(refused, 2)


class CountsItsTokens(Swish):
    """Cannot run without values, as some kernels of other libraries."""

    def forward(self, x):
        x.tolist()
        return super().forward(x)


def undecided(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    torch.manual_seed(0)
    original = Stack(CountsItsTokens)
    with pytest.raises(InputError, match=r"blocks.0.temperature would see this rank's features only, if it stands"):
        fm.parallelize(copy.deepcopy(original), mesh, MLP)
    for block in original.blocks:
        block.temperature.requires_grad_(False)
        block.scale = block.temperature
        del block.temperature
        block.temperature = 1.3
        del block.scale
    plan = {**MLP, "between": "replicated_with_grad_allreduce"}
    model = fm.parallelize(copy.deepcopy(original), mesh, plan)
    for a, b in zip(trained(model, mesh.tp_group), trained(original, None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_unit_that_cannot_be_tried_is_named_and_a_plan_decides():
    run_on_ranks(undecided, 2)


SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 23,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def families(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    xglm = {"d_model": 16, "attention_heads": 2, "num_layers": 2, "ffn_dim": 24}
    models = {
        "apertus": (hf.ApertusForCausalLM, hf.ApertusConfig(**SMALL, num_key_value_heads=2), 14, "XIELU"),
        "xglm": (hf.XGLMForCausalLM, hf.XGLMConfig(**SMALL, **xglm), 6, "layers.0.self_attn fails: RuntimeError"),
        "big bird": (hf.BigBirdForMaskedLM, hf.BigBirdConfig(**SMALL), 6, "layer.0.attention fails: RuntimeError"),
    }
    ids = torch.randint(3, 23, (2, 8), generator=torch.Generator().manual_seed(1))
    found = {}
    for name, (kind, config, sharded, said) in models.items():
        torch.manual_seed(0)
        original = kind(config).eval()
        model = fm.parallelize(copy.deepcopy(original), mesh)
        report = model.parallel_report
        assert len(report.sharded) == sharded and said in report.text, f"{name}: {report.text}"
        results = [one(input_ids=ids, labels=ids) for one in (model, original)]
        for one in results:
            one.loss.backward()
        torch.testing.assert_close(results[0].logits, results[1].logits, rtol=1e-4, atol=1e-5)
        wanted = dict(original.named_parameters())
        for key, p in model.named_parameters():
            if p.grad is not None:
                gradient = full_tensor(p, p.grad, mesh.tp_group)
                torch.testing.assert_close(gradient, wanted[key].grad, rtol=1e-4, atol=1e-5, msg=lambda t, k=key: k + t)
        found[name] = sharded
    return found


def test_families_of_transformers():
    first, second = run_on_ranks(families, 2)
    assert first == second
