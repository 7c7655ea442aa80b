"""Start here when BERT gives other losses or gradients at some layout.

BERT is compared with the same encoder in plain float64 torch, at every layout, with both orders of norms. (Comparison
with transformers and real weights: tests/hugging_face/test_load_model.py.)
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.config import BERTConfig
from fused_megatron.mesh import init_mesh
from fused_megatron.models import BERT, BatchSlice, cut_stages
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.testing.sharded_models import full_gradients, gradient_errors, perturb_vectors_

SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 24, "num_heads": 4, "seq_len": 16, "ffn_hidden_size": 44, "vocab_size": 101,
    "pad_vocab_size_to_multiple_of": 48, "init_std": 0.1, "next_sentence_head": True,
}  # fmt: skip
LAYOUTS: dict[int, list[tuple[dict[str, Any], bool]]] = {  # by number of ranks: changes, sequence_parallel
    2: [
        ({"recompute": "full"}, True),
        ({"hidden_dropout": 0.1, "attention_dropout": 0.2, "embedding_dropout": 0.1, "recompute": "selective"}, True),
    ],
    4: [
        ({"post_norm": True, "activation": "gelu_exact"}, True),
        ({"position": "rotary", "num_kv_heads": 2, "num_token_types": 0}, False),
    ],
}


def inputs(config: BERTConfig) -> dict[str, torch.Tensor]:
    """Return tokens, masked-LM targets, token types and padding, each [B, S], and random gradients of both outputs."""
    generator = torch.Generator().manual_seed(5)
    tokens, target = torch.randint(101, (2, 3, 12), generator=generator)
    target[torch.rand(3, 12, generator=generator) < 0.6] = -100
    types = torch.randint(2, (3, 12), generator=generator) if config.num_token_types else None
    found = {
        "tokens": tokens,
        "target": target,
        "key_padding_mask": torch.arange(12) >= torch.tensor([[12], [7], [10]]),
    }
    found |= {"losses": torch.randn(3, 12, generator=generator), "sentences": torch.randn(3, 2, generator=generator)}
    return found if types is None else found | {"token_types": types}


def backward_of(model: BERT) -> tuple[torch.Tensor, torch.Tensor]:
    """Return losses and next-sentence logits, after a backward from random gradients of both."""
    perturb_vectors_(model)
    given = inputs(model.config)
    options: dict[str, Any] = {k: given[k] for k in ("token_types", "key_padding_mask") if k in given}
    options["batch_slice"] = BatchSlice(3, 0, 3)
    losses = model(given["tokens"], given["target"], **options)
    sentences = model.next_sentence_logits(model.encode(given["tokens"], **options))
    outputs = (losses, sentences)
    torch.autograd.backward(outputs, [given["losses"].to(losses.dtype), given["sentences"].to(sentences.dtype)])
    return losses.detach(), sentences.detach()


def errors_of(rank: int, world_size: int) -> list[dict[str, float]]:
    """Return for each layout the largest error of the outputs and of each gradient, against one process in float64."""
    mesh, found = init_mesh(world_size), []
    for changes, sequence_parallel in LAYOUTS[world_size]:
        config = BERTConfig(**{**SIZES, **changes})
        whole = BERT(config, seed=3, dtype=torch.float64)
        expected = backward_of(whole)
        gradients = full_gradients(whole)
        model = BERT(config, layout=mesh.layout(sequence_parallel=sequence_parallel), seed=3, dtype=torch.float32)
        outputs = zip(("losses", "sentences"), backward_of(model), expected, strict=True)
        errors = {name: float((ours - theirs).abs().max()) for name, ours, theirs in outputs}
        # The gradient of a key bias is small, so its error is compared with the gradient of the query bias.
        errors |= gradient_errors(model, gradients.__getitem__, lambda name: name.replace("bias.key", "bias.query"))
        errors |= errors_of_stages(model)
        found.append(errors)
    return found


def errors_of_stages(whole: BERT) -> dict[str, float]:
    """Return the largest differences of losses and gradients between two chained stages and the whole model (0)."""
    stages = [
        BERT(whole.config, stage=span, layout=whole.layout, seed=3) for span in cut_stages(whole.config, 2, [1, 1])
    ]
    assert sum(stage.num_parameters() for stage in stages) == whole.num_parameters()
    whole.zero_grad()
    weights = dict(whole.named_parameters())
    for name, parameter in [pair for stage in stages for pair in stage.named_parameters()]:
        assert parameter.dim() == 1 or torch.equal(parameter, weights[name])
        parameter.data.copy_(weights[name])
    given, options = inputs(whole.config), {"batch_slice": BatchSlice(3, 0, 3)}
    options |= {k: given[k] for k in ("token_types", "key_padding_mask") if k in given}
    losses = whole(given["tokens"], given["target"], **options)
    losses.backward(given["losses"])
    first = stages[0](given["tokens"], **options)
    received = first.detach().requires_grad_()
    staged = stages[1].loss(stages[1](received, **options), given["target"])
    staged.backward(given["losses"])
    first.backward(received.grad)
    found = {"stages: losses": float((staged - losses).detach().abs().max())}
    parts = [dict(stage.named_parameters()) for stage in stages]
    assert parts[0].keys() & parts[1].keys() == {"token_embedding.weight"}
    for name, parameter in weights.items():
        gradients = [part[name].grad for part in parts if name in part and part[name].grad is not None]
        if parameter.grad is not None:
            found[f"stages: {name}"] = float((sum(gradients) - parameter.grad).abs().max())
    return found


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_outputs_and_every_gradient_at_every_layout_are_those_of_one_process(world_size: int) -> None:
    for rank in run_on_ranks(errors_of, world_size):
        for (changes, _), errors in zip(LAYOUTS[world_size], rank, strict=True):
            assert len(errors) > 30
            for name, error in errors.items():
                assert error <= (0.0 if name.startswith("stages") else 1e-5), f"{changes}: {name}: {error:.1e}"


def plain_losses(model: BERT, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute masked-LM losses [B, S] from the model's weights with plain torch."""
    w, config = dict(model.named_parameters()), model.config
    exact = "none" if config.activation == "gelu_exact" else "tanh"
    batch, seq_len = given["tokens"].shape

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], config.layer_norm_eps)

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        q, k, v = linear(x, f"{name}.query_key_value").view(batch, seq_len, 4, 3, 6).permute(3, 0, 2, 1, 4)
        scores = (q @ k.transpose(-1, -2) / 6**0.5).masked_fill(given["key_padding_mask"][:, None, None], float("-inf"))
        return linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, seq_len, 24), f"{name}.projection")

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(F.gelu(linear(x, f"{name}.expansion"), approximate=exact), f"{name}.projection")

    x = w["token_embedding.weight"][given["tokens"]] + w["position_embedding"][:seq_len]
    x = x + w["token_type_embedding"][given["token_types"]]
    x = norm(x, "embedding_norm") if config.post_norm else x
    for i in range(config.num_layers):
        for part, layer in (("attention", attention), ("mlp", mlp)):
            name, before = f"blocks.{i}.{part}", f"blocks.{i}.{part}_norm"
            x = norm(x + layer(x, name), before) if config.post_norm else x + layer(norm(x, before), name)
    x = x if config.post_norm else norm(x, "final_norm")
    x = norm(F.gelu(linear(x, "head_transform"), approximate=exact), "head_norm")
    logits = x @ w["token_embedding.weight"][:101].t() + w["head_bias"][:101]
    return F.cross_entropy(logits.flatten(0, 1), given["target"].flatten(), reduction="none").view(batch, seq_len)


@pytest.mark.parametrize("changes", [{}, {"post_norm": True, "activation": "gelu_exact"}], ids=str)
def test_losses_are_those_of_the_plain_encoder(changes: dict[str, Any]) -> None:
    model = BERT(BERTConfig(**{**SIZES, **changes}), seed=1, dtype=torch.float64)
    losses, _ = backward_of(model)
    expected = plain_losses(model, inputs(model.config)).detach()
    torch.testing.assert_close(losses.double(), expected, rtol=0, atol=1e-6)
    assert losses.count_nonzero() == (inputs(model.config)["target"] >= 0).sum()


def test_every_token_sees_every_other_but_padding() -> None:
    model = BERT(BERTConfig(**SIZES), seed=1)
    given = inputs(model.config)
    hidden = model.encode(given["tokens"], key_padding_mask=given["key_padding_mask"])
    with pytest.warns(DeprecationWarning, match=r"is_padding= of BERT.encode\(\) is now called key_padding_mask="):
        assert torch.equal(model.encode(given["tokens"], is_padding=given["key_padding_mask"]), hidden)
    changed = given["tokens"].clone()
    changed[1, 9] = (changed[1, 9] + 1) % 101  # padding
    changed[2, 9] = (changed[2, 9] + 1) % 101
    differs = (model.encode(changed, key_padding_mask=given["key_padding_mask"]) != hidden).any(-1).t()
    assert not differs[0].any() and differs[1].nonzero().flatten().tolist() == [9] and differs[2].all()


def test_heads_that_are_not_there_and_fields_that_do_not_fit() -> None:
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    model = BERT(BERTConfig(**{**SIZES, "masked_lm_head": False, "next_sentence_head": False, "num_token_types": 0}))
    assert not any(name.startswith(("head", "pooler")) for name, _ in model.named_parameters())
    hidden = model.encode(tokens)
    for call, message in (
        (lambda: model(tokens), "masked_lm_head=False"),
        (lambda: model.next_sentence_logits(hidden), "next_sentence_head=False"),
        (lambda: model.encode(tokens, token_types=tokens), "token_types must be None where num_token_types=0"),
        (
            lambda: model.encode(tokens, key_padding_mask=torch.zeros(4, 1).bool()),
            r"key_padding_mask.shape=\(4, 1\) must be",
        ),
        (lambda: model.encode(torch.zeros(1, 17, dtype=torch.int64)), r"tokens.shape\[1\]=17 must be at most"),
        (lambda: BERTConfig(activation="swiglu"), "activation='swiglu' must be one of: 'gelu', 'gelu_exact'"),
        (lambda: BERTConfig(tied_embeddings=False), "tied_embeddings=False must be True"),
        (lambda: BERTConfig(sliding_window=4), "sliding_window=4 must be None"),
        (lambda: BERTConfig(num_token_types=-1), "num_token_types=-1 must be 0 or more"),
    ):
        with pytest.raises(InputError, match=message):
            call()  # type: ignore[no-untyped-call]
