"""Start here when a full state dict of a parallel model lacks something, or does not load again."""

import re

import pytest
import torch
import transformers as hf
from safetensors import safe_open

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.testing import run_on_ranks


def gpt2(seed=0):
    torch.manual_seed(seed)
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=23, n_positions=8))


def way_back(rank, world_size, folder):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    original = gpt2()
    model = fm.parallelize(gpt2(), mesh)
    state = fm.full_state_dict(model, rank0_only=True)
    assert bool(state) == (rank == 0)
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
    torch.distributed.barrier()
    again = hf.GPT2LMHeadModel.from_pretrained(folder)
    for name, value in original.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    # From a file, without ever reading a whole tensor, into a model that was made on the meta device.
    with torch.device("meta"):
        empty = hf.GPT2LMHeadModel(original.config)
    fm.parallelize(empty, mesh)
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu").tie_weights()  # torch's to_empty parts what is tied
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        fm.load_full_state_dict(empty, slices)
    ids = torch.arange(8).unsqueeze(0)
    torch.testing.assert_close(empty.eval()(ids).logits, original.eval()(ids).logits)
    assert empty.lm_head.weight is empty.transformer.wte.weight
    refused(model, original.state_dict())


def refused(model, state):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    name = "transformer.h.0.mlp.c_fc.weight"
    wrong = state | {name: state[name].t()}
    cases = [
        ({k: v for k, v in state.items() if k != name}, f"state has no '{name}'"),
        (state | {"extra": torch.ones(1)}, "state has, and the model has not, 'extra'"),
        (wrong, re.escape(f"state['{name}'].shape=(64, 16) must be (16, 64)")),
    ]
    for faulty, message in cases:
        with pytest.raises(InputError, match=message):
            fm.load_full_state_dict(model, faulty)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fm.load_full_state_dict(model, gpt2(1).state_dict() | {"extra": torch.ones(1)}, strict=False)
    assert torch.equal(fm.full_state_dict(model)[name], gpt2(1).state_dict()[name])


def test_way_back(tmp_path):
    run_on_ranks(way_back, 2, tmp_path, timeout_s=240)


def test_any_other_model_gives_its_own():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    state = fm.full_state_dict(model)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert state["0.weight"].data_ptr() != model[0].weight.data_ptr()
