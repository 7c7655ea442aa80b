"""Start here when logits, gradients, tokens or keys of a parallelized model differ from the original's."""

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
from fused_megatron.testing import run_on_ranks

SMALL = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 61, "intermediate_size": 48,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def gpt2():
    """Odd vocabulary size, head tied to the embedding, Conv1D, one matrix for query, key and value."""
    small = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 61, "n_positions": 32}
    small |= {"bos_token_id": 1, "eos_token_id": 2}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**small, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2))


def llama_tied():
    """One key-value head, fewer than ranks."""
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True))


def mistral():
    return hf.MistralForCausalLM(hf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4))


def qwen2():
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, num_key_value_heads=1))


def qwen3():
    """Norms over single heads, between sharded layers."""
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True))


def bert():
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, **NO_DROPOUT))


FAMILIES = {build.__name__: build for build in (gpt2, llama, llama_tied, mistral, qwen2, qwen3, bert)}


def built(family):
    """A model with random weights, norms and biases too, the same on every rank."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def batch(seq_len=8):
    """Token ids, a mask that hides the end of one row, and labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (2, seq_len), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model, tp_group):
    """Return the full gradient of every parameter."""
    transposed = is_transposed(model)
    return {
        name: None if p.grad is None else full_tensor(p, p.grad, tp_group, transposed.get(p, False))
        for name, p in model.named_parameters()
    }


def train_twice(model, step):
    """Two microbatches before one backward of a weighted sum, with an evaluation in between."""
    first, second = model(**batch()), model(**batch(12))
    model.eval()
    with torch.no_grad():
        model(**batch(5))  # a length that the ranks do not divide
    model.train()
    (first.loss + 2.5 * second.loss).backward()
    if step:
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    return first


def assert_near(name, a, b, tolerance):
    assert (a is None) == (b is None), name
    if a is not None:
        assert a.shape == b.shape, name
        # Some gradients are 0 except for rounding (biases of keys): the tolerance is relative to the largest gradient.
        error = (a - b).abs().max() / b.abs().max().clamp(min=1e-2)
        assert error < tolerance, f"{name}: {error:.1e}"


def check_family(family, mesh, sequence_parallel, checkpointing):
    original = built(family).train()
    model = copy.deepcopy(original)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        if checkpointing:
            model.enable_input_require_grads()
    before = copy.deepcopy(original.state_dict())
    assert fm.parallelize(model, mesh, sequence_parallel=sequence_parallel, strict=True) is model
    if mesh.tp_size > 1:
        assert all(one.reason == "whole by the plan" or "Head" in one.kind for one in model.parallel_report.left)
        mine = sum(p.numel() for p in model.parameters())
        assert mine < 0.8 * sum(p.numel() for p in original.parameters())
    assert model.parallel_report.sequence_parallel == (sequence_parallel and mesh.tp_size > 1)
    state = fm.full_state_dict(model)
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before), "round trip"
    ours, theirs = train_twice(model, step=True), train_twice(original, step=True)
    assert_near("loss", ours.loss, theirs.loss, 1e-5)
    assert_near("logits", ours.logits, theirs.logits, 1e-4)
    expected = dict(original.named_parameters())
    for name, gradient in gradients(model, mesh.tp_group).items():
        assert_near(name, gradient, expected[name].grad, 1e-4)
    for name, value in fm.full_state_dict(model).items():  # tied weights are still tied after the step
        assert_near(name, value.float(), original.state_dict()[name].float(), 1e-4)
    model.eval(), original.eval()
    if hasattr(model, "generate") and family != "bert":
        prompt = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        ids = batch(5)["input_ids"]
        assert torch.equal(model.generate(ids, **prompt), original.generate(ids, **prompt))
    fm.load_full_state_dict(model, before)
    assert all(torch.equal(value, before[name]) for name, value in fm.full_state_dict(model).items()), "load"


def all_families(rank, world_size, layouts, families):
    warnings.simplefilter("ignore")  # transformers' deprecations
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    for family in families:
        for sequence_parallel, checkpointing in layouts:
            try:
                check_family(family, mesh, sequence_parallel, checkpointing)
            except Exception as error:
                raise AssertionError(f"{family}, {sequence_parallel=}, {checkpointing=}: {error}") from error


@pytest.mark.slow
def test_one_rank():
    all_families(0, 1, [(True, None)], FAMILIES)


def test_two_ranks():
    """One rank, and all families with and without sequence parallelism, are marked slow."""
    run_on_ranks(all_families, 2, [(True, None)], ["gpt2", "llama_tied", "bert"], timeout_s=400)
    run_on_ranks(all_families, 2, [(False, None)], ["gpt2", "qwen3"], timeout_s=400)


@pytest.mark.slow
def test_every_family_on_two_ranks():
    run_on_ranks(all_families, 2, [(False, None), (True, None)], list(FAMILIES), timeout_s=1500)


@pytest.mark.parametrize("families", [["llama"], pytest.param(["gpt2", "bert"], marks=pytest.mark.slow)], ids=str)
def test_gradient_checkpointing_on_two_ranks(families):
    layouts = [(False, False), (True, False), (True, True)]
    run_on_ranks(all_families, 2, layouts, families, timeout_s=400)


@pytest.mark.slow
def test_four_ranks_that_share_key_value_heads():
    run_on_ranks(all_families, 4, [(True, None)], ["llama", "qwen3"], timeout_s=400)


def packed_documents(rank, world_size, families):
    """Compare two packed documents with the same documents one by one in the original model: logits and gradients."""
    mesh, (first, length) = fm.init_mesh(tensor_parallel_size=world_size), (5, 12)
    ids = torch.randint(3, 61, (1, length), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(first), torch.arange(length - first)])[None]
    upstream = torch.randn(1, length, 61, generator=torch.Generator().manual_seed(2))
    for family in families:
        original = built(family).train()
        model = fm.parallelize(copy.deepcopy(original), mesh, sequence_parallel=True)
        # With a key-value cache, which is the default, transformers does not look for documents.
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([original(input_ids=part).logits for part in ids.split((first, length - first), 1)], 1)
        assert_near("logits", packed, alone, 1e-4)
        packed.backward(upstream)
        alone.backward(upstream)
        expected = dict(original.named_parameters())
        for name, gradient in gradients(model, mesh.tp_group).items():
            assert_near(f"{family}: {name}", gradient, expected[name].grad, 1e-4)


def test_documents_that_restart_their_position_ids():
    run_on_ranks(packed_documents, 2, ["gpt2", "mistral"], timeout_s=400)


def lower_precisions_and_copies(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    exact = built("llama")(**batch()).logits.detach()
    original = built("llama").bfloat16()
    model = fm.parallelize(copy.deepcopy(original), mesh, sequence_parallel=True)
    error = (model(**batch()).logits - exact).abs().max()
    assert error < 2 * (original(**batch()).logits - exact).abs().max()
    model = fm.parallelize(built("llama"), mesh, sequence_parallel=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (model(**batch()).logits - exact).abs().max() < 0.05
    twin = copy.deepcopy(model)  # a copy of a parallel model, as averages of weights need it
    twin(**batch()).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(twin(**batch()).logits, model(**batch()).logits)


def test_lower_precisions_and_copies():
    run_on_ranks(lower_precisions_and_copies, 2, timeout_s=400)


def hidden_states(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    model = fm.parallelize(built("llama"), mesh, sequence_parallel=True)
    with pytest.raises(InputError, match="output_hidden_states"):
        model(**batch(), output_hidden_states=True)
    with torch.no_grad():
        assert len(model(**batch(), output_hidden_states=True).hidden_states) == 3
    with pytest.raises(InputError, match="sequence length=7 must be divisible by tensor_parallel_size=2"):
        model(**batch(7))


def test_hidden_states_are_refused_under_sequence_parallelism():
    run_on_ranks(hidden_states, 2, timeout_s=400)


def compiled(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SMALL | {"num_hidden_layers": 1}, num_key_value_heads=2)
    original = hf.LlamaForCausalLM(config)
    model = fm.parallelize(copy.deepcopy(original), mesh, sequence_parallel=True)
    ids = batch()["input_ids"]
    logits = torch.compile(model, backend="eager")(ids).logits
    torch.testing.assert_close(logits, original(ids).logits, rtol=1e-4, atol=1e-4)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    logits.backward(upstream)
    original(ids).logits.backward(upstream)
    expected = dict(original.named_parameters())
    for name, gradient in gradients(model, mesh.tp_group).items():
        assert_near(name, gradient, expected[name].grad, 1e-4)


@pytest.mark.slow  # the fast part runs examples/compile_model.py
def test_torch_compile_breaks_its_graphs_at_the_collectives():
    run_on_ranks(compiled, 2, timeout_s=400)


def freezes(rank, world_size):
    """Compare the trainable parameters before and after, and the frozen ones after a step."""
    mesh, found = fm.init_mesh(tensor_parallel_size=world_size), {}
    for family, build in (("gpt2", gpt2), ("llama", llama)):
        torch.manual_seed(0)
        model = build()
        for index, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(index % 3 == 0)
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        fm.parallelize(model, mesh)
        found[family] = before, {name: p.requires_grad for name, p in model.named_parameters()}
    return found


def test_frozen_parameters_stay_frozen():
    for found in run_on_ranks(freezes, 2):
        for before, after in found.values():
            assert before == after and set(before.values()) == {True, False}
