"""Start here when a Hugging Face model trains otherwise in rows of replicas than on one process."""

from typing import Any

import pytest
import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it
from torch import nn

import fused_megatron as fm
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks


def llama() -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=23,
        intermediate_size=24,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return hf.LlamaForCausalLM(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    rates = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=23, n_positions=8, **rates))


MAKE = {"llama": llama, "gpt2": gpt2}


def trained(model: Any, optimizer: Any, clip: Any, ids: Any) -> list[float]:
    """Train a Hugging Face model; return the norms before clipping."""
    norms = []
    for step in range(3):
        own = ids(torch.randint(23, (4, 8), generator=torch.Generator().manual_seed(step)))
        model(input_ids=own, labels=own).loss.backward()
        norms.append(float(clip(0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def hugging_face(rank: int, world_size: int, name: str, stage: int, recompute: Any) -> tuple[Any, list[float], Any]:
    mesh = fm.init_mesh(tensor_parallel_size=2)
    model = fm.parallelize(MAKE[name](), mesh)
    if recompute is not None:
        model.gradient_checkpointing_enable({"use_reentrant": recompute})
    fm.shard_data_parallel(model, mesh, stage, bucket_mb=1e-3)
    optimizer = fm.ShardedOptimizer(model, torch.optim.AdamW, lr=1e-2)
    norms = trained(model, optimizer, lambda most: fm.clip_grad_norm_(model, most), lambda x: x.chunk(2)[mesh.dp_rank])
    with pytest.raises(fm.checks.InputError, match="save_pretrained would write the shards of one rank"):
        model.save_pretrained("nowhere")
    tokens = model.eval().generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    return fm.full_state_dict(model), norms, tokens


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_hugging_face_model_in_shards_of_both_kinds(name: str) -> None:
    model = MAKE[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms = trained(model, optimizer, lambda most: nn.utils.clip_grad_norm_(model.parameters(), most), lambda x: x)
    tokens = model.eval().generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    cases = [(name, 2, None), (name, 3, False)] if name == "llama" else [(name, 1, None), (name, 3, True)]
    for case, by_rank in zip(cases, run_cases_on_ranks(hugging_face, 4, cases), strict=True):
        for weights, found, generated in by_rank:
            assert found == pytest.approx(norms, rel=1e-5), case
            assert torch.equal(generated, tokens), case
            for key, value in model.state_dict().items():
                torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-5, msg=f"{key} of {case}")
