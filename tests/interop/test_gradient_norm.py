"""Start here when `fm.clip_grad_norm_` gives another norm than the whole model's."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.distributed.fsdp import fully_shard

import fused_megatron as fm
from fused_megatron.interop import full_tensor
from fused_megatron.testing import run_on_ranks

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 13, "intermediate_size": 24}


def llama():
    """A key-value head that two ranks hold copies of, a tied head, an odd vocabulary."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0)
    return hf.LlamaForCausalLM(config)


def backward(model, rows):
    ids = torch.randint(0, 13, (4, 6), generator=torch.Generator().manual_seed(1))[rows]
    model(ids, labels=ids).loss.backward()


def clips(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    for norm_type in (2.0, 1.0, float("inf")):
        original = llama()
        model = fm.parallelize(copy.deepcopy(original), mesh)
        for one in (original, model):
            backward(one, slice(None))
        expected = torch.nn.utils.clip_grad_norm_(original.parameters(), 0.01, norm_type)
        torch.testing.assert_close(fm.clip_grad_norm_(model, 0.01, norm_type), expected, rtol=1e-5, atol=0)
        gradients = {name: p.grad for name, p in original.named_parameters()}
        for name, p in model.named_parameters():
            whole = full_tensor(p, p.grad, mesh.tp_group)
            torch.testing.assert_close(whole, gradients[name], rtol=1e-4, atol=1e-7)
    model.lm_head.weight.grad[0, 0] = float("nan")  # of one rank's shard, refused on both
    with pytest.raises(RuntimeError, match=r"the gradient norm of order 2\.0 is nan"):
        fm.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)


def test_shards_count_once_and_copies_too():
    run_on_ranks(clips, 2, timeout_s=240)


def test_a_model_without_shards():
    model = nn.Linear(3, 3)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one(torch.ones(2, 3)).sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    assert torch.equal(fm.clip_grad_norm_(model, 0.1), expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def with_fsdp2(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=2)
    original = llama()
    model = fm.parallelize(copy.deepcopy(original), mesh)
    fully_shard(model, mesh=mesh.device_mesh["dp"])
    backward(model, slice(2 * mesh.dp_rank, 2 * mesh.dp_rank + 2))
    for rows in (slice(0, 2), slice(2, 4)):
        backward(original, rows)
    for p in original.parameters():
        p.grad /= 2
    expected = torch.nn.utils.clip_grad_norm_(original.parameters(), 0.01)
    torch.testing.assert_close(fm.clip_grad_norm_(model, 0.01), expected, rtol=1e-5, atol=0)
    gradient = model.model.norm.weight.grad.full_tensor()
    torch.testing.assert_close(gradient, original.model.norm.weight.grad, rtol=1e-4, atol=1e-7)


def test_fsdp2_around_shards():
    run_on_ranks(with_fsdp2, 4, timeout_s=240)
