"""Start here when a parallel model returns one rank's part, or ranks draw different random numbers."""

import copy

import pytest
import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it
from torch import nn

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.testing import run_on_ranks

SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 23,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, attn_implementation="eager")).eval()


def asked(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    original = llama()
    model = fm.parallelize(copy.deepcopy(original), mesh)
    ids = torch.tensor([[3, 4, 5]])
    message = r"output_attentions=True of a parallel model would return the heads of one rank"
    for call in (model, model.model):
        with pytest.raises(InputError, match=message):
            call(ids, output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(InputError, match=message):
        model(ids)
    assert model(ids, output_attentions=False).attentions is None
    model.config.output_attentions = False
    whole = {"q_proj": "replicate", "embed_tokens": "embedding_rowwise"}
    attentions = fm.parallelize(llama(), mesh, whole)(ids, output_attentions=True).attentions[0]
    torch.testing.assert_close(attentions, original(ids, output_attentions=True).attentions[0])
    for one in (model, model.model):
        with pytest.raises(InputError, match=r"resize_token_embeddings of a parallel model: .*resize the model before"):
            one.resize_token_embeddings(30)

    sampling = {"do_sample": True, "max_new_tokens": 5, "min_new_tokens": 5}
    torch.manual_seed(rank)
    with pytest.raises(InputError, match=r"generate\(do_sample=True\): tensor-parallel ranks \[1\] would draw other"):
        model.generate(ids, **sampling)
    with pytest.raises(InputError, match=r"generate\(do_sample=True\)"):
        copy.deepcopy(model).generate(ids, generation_config=hf.GenerationConfig(**sampling))
    greedy = model.generate(ids, do_sample=False, max_new_tokens=3)
    torch.manual_seed(5)
    drawn = model.generate(ids, **sampling)
    torch.manual_seed(5)
    assert torch.equal(drawn, original.generate(ids, **sampling))

    dropping = fm.parallelize(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), mesh, {"0": "colwise_gather_output"})
    torch.manual_seed(rank)
    dropping.eval()(torch.ones(2, 4))
    with pytest.raises(InputError, match=r"dropout: tensor-parallel ranks \[1\] would draw other random numbers"):
        dropping.train()(torch.ones(2, 4))
    torch.manual_seed(0)
    y = copy.deepcopy(dropping)(torch.ones(2, 4))
    return greedy.tolist(), drawn.tolist(), y.tolist()


def test_calls_that_a_rank_cannot_answer_are_refused():
    first, second = run_on_ranks(asked, 2)
    assert first == second
