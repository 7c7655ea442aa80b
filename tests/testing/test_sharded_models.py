"""Start here when a comparison of sharded gradients misses a wrong element."""

import torch

from fused_megatron.config import GPTConfig
from fused_megatron.models import GPT
from fused_megatron.testing.sharded_models import full_gradients, gradient_errors, perturb_vectors_

CONFIG = GPTConfig(
    num_layers=1, hidden_size=16, num_heads=2, seq_len=8, vocab_size=40, num_kv_heads=1, activation="swiglu"
)


def model_after_backward() -> GPT:
    model = GPT(CONFIG)
    perturb_vectors_(model)
    tokens = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
    model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
    return model


def test_one_wrong_element_is_one_error_of_its_part() -> None:
    model = model_after_backward()
    assert all(not torch.equal(p, torch.ones_like(p)) for n, p in model.named_parameters() if "norm.weight" in n)
    right = {name: gradient.clone() for name, gradient in full_gradients(model).items()}
    assert set(gradient_errors(model, right.__getitem__).values()) == {0.0}
    name = "blocks.0.attention.query_key_value.weight.key"
    full_gradients(model)[name][3, 2] += 0.5 * right[name].abs().max()
    errors = gradient_errors(model, right.__getitem__)
    assert [key for key, error in errors.items() if error] == [name] and abs(errors[name] - 0.5) < 1e-6
    measure = {name: "token_embedding.weight"}
    scaled = gradient_errors(model, right.__getitem__, lambda key: measure.get(key, key))[name]
    ratio = right[name].abs().max() / right["token_embedding.weight"].abs().max()
    torch.testing.assert_close(scaled, 0.5 * float(ratio), rtol=1e-5, atol=0.0)
