"""Start here when replace_modules changes a model of transformers, or leaves a layer that Liger-Kernel would patch."""

import copy

import pytest
import torch
import transformers as hf
from safetensors import safe_open

from fused_megatron.modules import AdoptedRMSNorm, DeferredLogits, FusedHead, FusedRotary, GatedMLP, replace_modules

VOCAB, SEQUENCE = 61, 12
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": VOCAB, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# (configuration, architecture, more sizes)
MODELS = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {"head_dim": 8}),
    "gemma": (hf.GemmaConfig, hf.GemmaForCausalLM, {"head_dim": 8}),
    "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, {"head_dim": 8, "final_logit_softcapping": 1.5}),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": 5}),
    "phi3": (hf.Phi3Config, hf.Phi3ForCausalLM, {}),
    "granite": (hf.GraniteConfig, hf.GraniteForCausalLM, {"logits_scaling": 8.0, "attention_bias": True}),
}


def built(name, **more):
    configuration, architecture, sizes = MODELS[name]
    torch.manual_seed(0)
    model = architecture(configuration(**SIZES, **sizes, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def replaced(name, **more):
    """Return a replaced model and its twin."""
    twin = built(name, **more)
    model = copy.deepcopy(twin)
    return model, twin, replace_modules(model)


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2, SEQUENCE), generator=generator)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def compare(model, twin, **inputs):
    """Compare loss and gradients in float32."""
    ours, theirs = model(**batch() | inputs), twin(**batch() | inputs)
    assert isinstance(ours.logits, DeferredLogits) and not ours.logits.is_computed
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(model, ours.loss), gradients(twin, theirs.loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max() + 1))


@pytest.mark.parametrize("name", MODELS)
def test_all_layers_are_known_and_compute_the_same(name):
    model, twin, report = replaced(name)
    assert not report.left, str(report)
    layers = model.model.layers
    assert all(isinstance(layer.mlp, GatedMLP) and isinstance(layer.self_attn, FusedRotary) for layer in layers)
    assert isinstance(model.lm_head, FusedHead) and isinstance(model.model.norm, AdoptedRMSNorm)
    assert list(model.state_dict()) == list(twin.state_dict())
    compare(model, twin)
    compare(model, twin, num_items_in_batch=7)
    compare(copy.deepcopy(model), twin)


@pytest.mark.parametrize("name", MODELS)
def test_error_in_bfloat16_is_at_most_twice_eagers(name):
    exact = built(name).bfloat16().double()
    eager = copy.deepcopy(exact).bfloat16()
    fused = copy.deepcopy(eager)
    replace_modules(fused)
    results = []
    for model in (exact, eager, fused):
        # Many losses: the error of one may be small by luck.
        losses = [model(**batch(seed)).loss for seed in range(16)]
        own = gradients(model, losses[0])
        # Norms of single heads have 8 numbers, too few for a ratio of errors: they count in the whole gradient.
        large = [gradient for gradient in own if gradient.numel() > 256]
        results.append([torch.stack(losses).detach(), torch.cat([one.flatten() for one in own]), *large])
    for true, theirs, ours in zip(*results, strict=True):
        assert theirs.dtype == ours.dtype
        assert (ours.double() - true).norm() <= 2 * (theirs.double() - true).norm()


def test_logits_when_the_user_asks():
    model, twin, _ = replaced("gemma2")
    inputs = batch()
    out, expected = model(**inputs), twin(**inputs)
    torch.testing.assert_close(out.logits + 0, expected.logits, rtol=1e-4, atol=1e-5)
    ids = inputs["input_ids"]
    kept, wanted = model(input_ids=ids, logits_to_keep=3).logits, twin(input_ids=ids, logits_to_keep=3).logits
    assert kept.shape == (2, 3, VOCAB)
    torch.testing.assert_close(kept.log_softmax(-1), wanted.log_softmax(-1), rtol=1e-4, atol=1e-5)
    model.eval(), twin.eval()
    with torch.no_grad():
        assert type(model(**inputs).logits) is torch.Tensor
        torch.testing.assert_close(model(**inputs).loss, twin(**inputs).loss, rtol=1e-5, atol=1e-5)
        generated = [one.generate(ids, max_new_tokens=4, do_sample=False) for one in (model, twin)]
    assert torch.equal(*generated)


def test_checkpointing_padding_and_autocast():
    model, twin, _ = replaced("llama")
    mask = torch.ones(2, SEQUENCE, dtype=torch.int64)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    compare(model, twin, attention_mask=mask, position_ids=positions)
    for one in (model, twin):
        one.gradient_checkpointing_enable()
    compare(model.train(), twin.train())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(**batch()).loss, twin(**batch()).loss
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01)


def test_own_loss_function_and_custom_loop():
    twin = built("qwen3")
    twin.loss_function = lambda logits, labels, vocab_size, **_: logits.float().log_softmax(-1).square().mean()
    model = copy.deepcopy(twin)
    (left,) = replace_modules(model).left
    assert left.name == "loss_function" and "does more with the logits" in left.reason
    ours, theirs = model(**batch()).loss, twin(**batch()).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(model, ours), gradients(twin, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    logits = model(input_ids=batch()["input_ids"]).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch()["labels"][:, 1:].flatten())
    assert not logits.is_computed and loss.requires_grad


def test_saved_weights_are_the_models_own(tmp_path):
    model, twin, _ = replaced("llama")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    expected = twin.state_dict()
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * sum(t.nbytes for t in expected.values()) + 1e5
    loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    compare(model, loaded)


@pytest.mark.slow
def test_compiled():
    model, twin, _ = replaced("llama")
    compiled = torch.compile(model, backend="aot_eager")
    ours, theirs = compiled(**batch()).loss, twin(**batch()).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(model, ours), gradients(twin, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
