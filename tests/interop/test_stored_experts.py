"""Start here when load_pretrained_shards puts the experts of a folder into the wrong place, or does not find them."""

import pytest
import torch
import transformers as hf
import transformers.models.mixtral.modeling_mixtral
import transformers.models.qwen3_moe.modeling_qwen3_moe
from safetensors.torch import load_file, save_file

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.interop.stored_experts import stack_experts
from fused_megatron.weight_files import WeightFiles

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 31, "intermediate_size": 12}
SMALL |= {"num_key_value_heads": 1, "num_experts_per_tok": 2}
MODELS = {
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig(**SMALL, num_local_experts=3)),
    "qwen3_moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**SMALL, num_experts=3, moe_intermediate_size=5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_experts_are_stacked_as_in_the_model(tmp_path, name):
    kind, config = MODELS[name]
    model = kind(config)
    model.save_pretrained(tmp_path)
    stacked = stack_experts(model, WeightFiles(tmp_path).tensors)
    state = model.state_dict()
    assert stacked.keys() == state.keys()
    for key, value in stacked.items():
        assert torch.equal(value[(slice(None),) * len(value.shape)], state[key]), key
    weight, full = stacked["model.layers.1.mlp.experts.gate_up_proj"], state["model.layers.1.mlp.experts.gate_up_proj"]
    # From the middle of gate to the middle of up.
    where = (slice(1, 3), slice(2, full.shape[1] - 2), slice(3, 9))
    assert torch.equal(weight[where], full[where]) and tuple(weight.shape) == tuple(full.shape)
    with torch.device("meta"):
        empty = kind(config)
    fm.parallelize(empty, None)
    fm.load_pretrained_shards(empty, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(empty.parameters(), model.parameters(), strict=True))


def test_a_missing_expert_is_named(tmp_path):
    kind, config = MODELS["mixtral"]
    kind(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.1.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = kind(config)
    fm.parallelize(empty, None)
    with pytest.raises(InputError, match=r"state has no 'model.layers.1.mlp.experts.gate_up_proj'"):
        fm.load_pretrained_shards(empty, tmp_path)
