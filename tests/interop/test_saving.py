"""Start here when save_pretrained of a parallel model writes shards."""

import copy
import io
import pickle

import pytest
import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.testing import run_on_ranks

SMALL = {"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 13, "n_positions": 8, "bos_token_id": 1}


def gpt2():
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**SMALL, eos_token_id=2))


def assert_saved(folder, original):
    state = hf.GPT2LMHeadModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())


def saves(rank, world_size, folder):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    original = gpt2()
    model = fm.parallelize(copy.deepcopy(original), mesh)
    with pytest.raises(InputError, match=r"save_pretrained would write the shards of one rank \(state = full"):
        model.save_pretrained(folder / "never")
    with pytest.raises(InputError, match=r"wte.weight'\].shape=\(7, 16\) must be \(13, 16\): it is no whole state"):
        model.save_pretrained(folder / "never", state_dict=model.state_dict())
    assert not (folder / "never").exists()
    state = fm.full_state_dict(model)
    if rank == 0:
        model.save_pretrained(folder / "whole", state_dict=state)
        assert_saved(folder / "whole", original)
    with pytest.raises(InputError, match="cannot be pickled, since it belongs to a group of running processes"):
        pickle.dumps(model)
    with pytest.raises(InputError, match="cannot be pickled"):
        torch.save(model, io.BytesIO())
    twin = copy.deepcopy(model)
    assert twin.save_pretrained.model is twin


def test_full_tensors_or_an_error(tmp_path):
    run_on_ranks(saves, 2, tmp_path, timeout_s=240)


def test_one_rank_saves_by_itself(tmp_path):
    """Also on one rank, GPT-2's transposed weights are stored as [O, I]."""
    model = fm.parallelize(gpt2(), None)
    model.save_pretrained(tmp_path)
    assert_saved(tmp_path, gpt2())
