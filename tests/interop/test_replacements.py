"""Start here when an optimizer that was made before `fm.parallelize` does not move the weights."""

import copy

import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it

import fused_megatron as fm
from fused_megatron.testing import run_on_ranks


def trained(model, optimizer, ids):
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return fm.full_state_dict(model)


def made_before(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 23, "n_positions": 8, "bos_token_id": 1}
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    original = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **dropout, eos_token_id=2))
    ids = torch.arange(8).unsqueeze(0)
    model = copy.deepcopy(original)
    model(ids, labels=ids).loss.backward()
    alive = model(ids).logits  # its graph has the parameters in their old shapes
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    fm.parallelize(model, mesh)
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert model.lm_head.weight is model.transformer.wte.weight
    expected = trained(original, torch.optim.SGD(original.parameters(), lr=0.01, momentum=0.9), ids)
    for name, value in trained(model, optimizer, ids).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")
    assert alive.requires_grad


def test_an_optimizer_made_before_moves_all_weights():
    run_on_ranks(made_before, 2)
