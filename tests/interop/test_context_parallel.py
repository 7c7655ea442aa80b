"""Start here when logits, loss or gradients of a transformers model under context parallelism differ from before."""

import copy
import warnings

import pytest
import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.interop import full_tensor
from fused_megatron.interop.full_state import is_transposed
from fused_megatron.testing import run_cases_on_ranks

SMALL = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 61, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def gpt2(**options):
    small = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 61, "n_positions": 64}
    rates = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0} | options
    return hf.GPT2LMHeadModel(hf.GPT2Config(**small, bos_token_id=1, eos_token_id=2, **rates))


def llama(**options):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2, **options))


def mistral():
    return hf.MistralForCausalLM(hf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4))


def qwen3():
    """Norms over single heads."""
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True))


def gemma3():
    """A layer with a window and a layer without."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SMALL, num_key_value_heads=1, head_dim=8, **layers))


BUILDERS = {build.__name__: build for build in (gpt2, llama, mistral, qwen3, gemma3)}


def built(family):
    torch.manual_seed(0)
    model = BUILDERS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def batch(kind, seq_len=13):
    """Two samples: plain, padded on the right, or packed documents."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (2, seq_len), generator=generator)
    found = {"input_ids": ids, "labels": ids.clone()}
    if kind == "padded":
        found["attention_mask"] = torch.ones_like(ids)
        found["attention_mask"][1, -3:] = 0
        found["labels"][1, -3:] = -100
    if kind == "packed":
        rows = [[*range(5), *range(seq_len - 5)], [*range(2), *range(8), *range(seq_len - 10)]]
        found |= {"position_ids": torch.tensor(rows), "use_cache": False}
    return found


def assert_near(name, a, b, tolerance):
    error = (a - b).abs().max() / b.abs().max().clamp(min=1e-2)
    assert error < tolerance, f"{name}: {error:.1e}"


def check_equal(model, original, mesh, inputs):
    """Compare logits, loss and every gradient."""
    ours, theirs = model(**inputs), original(**inputs)
    real = inputs.get("attention_mask", torch.ones(inputs["input_ids"].shape)) == 1
    assert_near("logits", ours.logits[real], theirs.logits[real], 1e-5)
    assert_near("loss", ours.loss, theirs.loss, 1e-5)
    ours.loss.backward(), theirs.loss.backward()
    transposed, expected = is_transposed(model), dict(original.named_parameters())
    for name, p in model.named_parameters():
        assert_near(name, full_tensor(p, p.grad, mesh.tp_group, transposed[p]), expected[name].grad, 1e-5)
        p.grad = expected[name].grad = None


def family(rank, world_size, name, kinds, method, options):
    warnings.simplefilter("ignore")  # transformers' deprecations
    mesh = fm.init_mesh(context_parallel_size=2, tensor_parallel_size=world_size // 2)
    original = built(name).train()
    model = copy.deepcopy(original)
    if "use_reentrant" in options:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    fm.parallelize(model, mesh, context_parallel_method=method)
    for kind in kinds:
        try:
            check_equal(model, original, mesh, batch(kind))
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from error
    return str(model.parallel_report)


CASES = [
    ("llama", ["plain", "padded", "packed"], "ring", {}),
    ("llama", ["packed"], "all_gather", {"use_reentrant": False}),
    ("llama", ["plain"], "ring", {"use_reentrant": True}),
    ("mistral", ["plain", "padded", "packed"], "ring", {}),
    ("qwen3", ["padded", "packed"], "all_to_all", {}),
    ("gpt2", ["plain", "padded", "packed"], "ring", {}),
    ("gemma3", ["plain", "packed"], "all_gather", {}),
]


def test_two_ranks():
    for (report, _), case in zip(run_cases_on_ranks(family, 2, CASES), CASES, strict=True):
        assert "sequences divided over 2 ranks: 2 layers of" in report and f"attention by {case[2]}" in report


def test_tensor_and_context_parallel_ranks():
    """Norms of heads are summed over both axes; GPT-2 has one matrix for query, key and value."""
    cases = [("qwen3", ["packed"], "ring", {}), ("gpt2", ["padded"], "ring", {"use_reentrant": False})]
    for reports in run_cases_on_ranks(family, 4, cases):
        assert "sharded over 2 ranks" in reports[0] and "divided over 2 ranks" in reports[0]
