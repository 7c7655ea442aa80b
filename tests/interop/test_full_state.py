"""Start here when a full state dict of a parallel model lacks something, or does not load again."""

import re

import pytest
import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it
from safetensors import safe_open

import fused_megatron as fm
from fused_megatron.checkpoint.model_state import parameter_boxes
from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig
from fused_megatron.models import GPT
from fused_megatron.sharding import mark_all_shards
from fused_megatron.testing import run_on_ranks


def gpt2(seed=0):
    torch.manual_seed(seed)
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=23, n_positions=8))


def round_trip(rank, world_size, folder):
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
    # Into a model made on the meta device, from slices of a file: no rank reads a full tensor.
    with torch.device("meta"):
        empty = hf.GPT2LMHeadModel(original.config)
    fm.parallelize(empty, mesh)
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu").tie_weights()  # torch's to_empty unties parameters
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        fm.load_full_state_dict(empty, slices)
    ids = torch.arange(8).unsqueeze(0)
    torch.testing.assert_close(empty.eval()(ids).logits, original.eval()(ids).logits)
    assert empty.lm_head.weight is empty.transformer.wte.weight
    loaded_by_torch(model, original.state_dict())
    refused(model, original.state_dict())


def loaded_by_torch(model, state):
    """Full tensors in torch's load_state_dict, at once or file by file; its own state_dict still loads, too."""
    mine = {name: value.clone() for name, value in model.state_dict().items()}
    other = gpt2(2).state_dict()
    model.load_state_dict(other)
    assert all(torch.equal(value, other[name]) for name, value in fm.full_state_dict(model).items())
    model.load_state_dict(mine)
    assert all(torch.equal(value, state[name]) for name, value in fm.full_state_dict(model).items())
    around = torch.nn.ModuleDict({"inner": model})
    name = "transformer.h.0.attn.c_attn.weight"
    around.load_state_dict({f"inner.{name}": other[name]}, strict=False)
    assert torch.equal(fm.full_state_dict(model)[name], other[name])
    with pytest.raises(RuntimeError, match=r"size mismatch for transformer.h.0.mlp.c_fc.weight"):
        model.load_state_dict({**other, "transformer.h.0.mlp.c_fc.weight": torch.ones(3, 4)})
    model.load_state_dict(mine)


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


def test_round_trip(tmp_path):
    run_on_ranks(round_trip, 2, tmp_path, timeout_s=240)


def with_other_tensors(model, way):
    """Return the model with the same values in new tensors, which have no shard record."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if way == "assign":
        model.load_state_dict(state, assign=True)
    elif way == "meta, then assign":
        model.to("meta").load_state_dict(state, assign=True)
    for module in model.modules() if "assign" not in way else ():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            new = torch.nn.Parameter(parameter.detach().clone())
            if way == "attribute":
                setattr(module, name, new)
            elif way == "dictionary":
                module._parameters[name] = new
            else:
                torch.utils.swap_tensors(parameter, new)
    return model


def facts(model):
    """Return results that depend on the shard record of each tensor."""
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    norm = float(fm.clip_grad_norm_(model, 1e9))
    found = {"state": fm.full_state_dict(model), "norm": norm}
    if isinstance(model, GPT):
        found["parameters"] = model.num_parameters()
        mark_all_shards(model)  # as the trainer does
        boxes = parameter_boxes(dict(model.named_parameters()))
        found["boxes"] = {name: (box.full_shape, box.offset) for name, box in boxes.items()}
    return found


def lose_records(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "seq_len": 8, "vocab_size": 23}
    untied = gpt2().config
    untied.tie_word_embeddings = False
    makers = {
        "GPT": lambda: GPT(GPTConfig(**sizes, tied_embeddings=False, num_kv_heads=1), layout=mesh.layout(), seed=1),
        "parallelize": lambda: fm.parallelize(hf.GPT2LMHeadModel(untied), mesh),
    }
    for kind, make in makers.items():
        torch.manual_seed(0)
        model = make()
        expected = facts(model)
        for way in ("attribute", "dictionary", "swap_tensors", "assign", "meta, then assign"):
            found = facts(with_other_tensors(model, way))
            state, wanted = found.pop("state"), expected["state"]
            assert all(torch.equal(value, wanted[name]) for name, value in state.items()), (kind, way)
            assert found == {name: expected[name] for name in found}, (kind, way)
            assert all(value.shape == wanted[name].shape for name, value in state.items()), (kind, way)
            fm.load_full_state_dict(with_other_tensors(model, way), wanted)
            refused = with_other_tensors(model, way)
            if kind == "parallelize":
                with pytest.raises(InputError, match="it is no whole state"):
                    refused.save_pretrained("never", state_dict=refused.state_dict())


def test_tensors_without_a_record_change_nothing():
    run_on_ranks(lose_records, 2)


def test_a_model_that_is_not_parallel_returns_its_own_state():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    state = fm.full_state_dict(model)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert state["0.weight"].data_ptr() != model[0].weight.data_ptr()
