"""Start here when grouped heads, RMS norms, SwiGLU or rotary angles of a model are wrong.

The parts that Llama, Mistral and Qwen add to the GPT: the same numbers at every layout, and angles as in transformers.
(Comparison with whole models of transformers: tests/hugging_face/test_known_families.py.)
"""

import dataclasses
from typing import Any

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig
from fused_megatron.mesh import init_mesh
from fused_megatron.models import GPT, BatchSlice
from fused_megatron.models.rotary import rotary_tables
from fused_megatron.sharding import SequenceLayout
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.testing.sharded_models import full_gradients, gradient_errors, perturb_vectors_

LLAMA: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "seq_len": 16, "ffn_hidden_size": 44,
    "vocab_size": 101, "pad_vocab_size_to_multiple_of": 48, "init_std": 0.1, "activation": "swiglu",
    "normalization": "rms_norm", "position": "rotary", "tied_embeddings": False, "linear_biases": False,
}  # fmt: skip
YARN = {"rotary_scaling": "yarn", "rotary_scaling_factor": 4.0, "rotary_original_seq_len": 8}
LAYOUTS: dict[int, list[tuple[dict[str, Any], bool]]] = {  # by number of ranks: changes, sequence_parallel
    2: [
        ({"query_key_norm": True, "num_kv_heads": None, "recompute": "full", **YARN}, True),
        ({"activation": "gelu_exact", "tied_embeddings": True, "head_dim": 8, "num_kv_heads": 1}, True),
    ],
    # 2 key-value heads are fewer than 4 ranks; the last rank's vocabulary is only padding.
    4: [
        ({}, True),
        ({"head_dim": 10, "query_key_norm": True, "sliding_window": 3, "recompute": "selective"}, False),
        ({"qkv_bias": True, "sliding_window": 5, "attention_dropout": 0.3, "hidden_dropout": 0.1}, True),
    ],
}


def tokens_and_upstream() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(101, (3, 13), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], torch.randn(3, 12, generator=generator)


def backward_of(model: GPT) -> torch.Tensor:
    """Return losses, after a backward from a random gradient."""
    perturb_vectors_(model)
    tokens, target, upstream = tokens_and_upstream()
    losses: torch.Tensor = model(tokens, target, batch_slice=BatchSlice(3, 0, 3))
    losses.backward(upstream.to(losses.dtype))
    return losses.detach()


def errors_of(rank: int, world_size: int) -> list[dict[str, float]]:
    """Return for each layout the largest error of the losses and of each gradient, against one process in float64."""
    mesh, found = init_mesh(world_size), []
    for changes, sequence_parallel in LAYOUTS[world_size]:
        config = GPTConfig(**{**LLAMA, **changes})
        whole = GPT(config, seed=3, dtype=torch.float64)
        losses = backward_of(whole)
        gradients = full_gradients(whole)
        model = GPT(config, layout=mesh.layout(sequence_parallel=sequence_parallel), seed=3, dtype=torch.float32)
        errors = {"losses": float((backward_of(model) - losses).abs().max())}
        # The gradient of a key bias is small, so its error is compared with the gradient of the query bias.
        errors |= gradient_errors(model, gradients.__getitem__, lambda name: name.replace("bias.key", "bias.query"))
        found.append(errors)
    return found


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_losses_and_every_gradient_at_every_layout_are_those_of_one_process(world_size: int) -> None:
    for rank in run_on_ranks(errors_of, world_size):
        for (changes, _), errors in zip(LAYOUTS[world_size], rank, strict=True):
            assert len(errors) > 12
            for name, error in errors.items():
                assert error < 1e-5, f"{changes}: {name}: {error:.1e}"


def test_what_the_fields_leave_out_and_add() -> None:
    names = {name for name, _ in GPT(GPTConfig(**LLAMA)).named_parameters()}
    assert not any("bias" in name for name in names)
    changes = {"qkv_bias": True, "query_key_norm": True, "head_dim": 10}
    model = GPT(GPTConfig(**{**LLAMA, **changes}))
    added = {name.removeprefix("blocks.0.") for name, _ in model.named_parameters() if "blocks.0" in name} - {
        name.removeprefix("blocks.0.") for name in names
    }
    assert added == {"attention.query_key_value.bias", "attention.query_norm.weight", "attention.key_norm.weight"}
    attention = model.get_submodule("blocks.0.attention")
    assert attention.query_key_value.weight.shape == (10 * (4 + 2 + 2), 24)
    assert attention.projection.weight.shape == (24, 40) and attention.query_norm.weight.shape == (10,)


def test_a_window_hides_what_lies_before_it_with_and_without_dropout() -> None:
    tokens, _, _ = tokens_and_upstream()
    config = GPTConfig(**{**LLAMA, "num_layers": 1, "sliding_window": 4})
    logits = GPT(config, seed=1)(tokens)
    changed = tokens.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 101
    differs = (GPT(config, seed=1)(changed) != logits).any(-1).any(0)
    assert differs.tolist() == [False] * 2 + [True] * 4 + [False] * 6
    # With dropout attention keeps the probabilities; here it drops almost nothing.
    dropping = GPT(dataclasses.replace(config, attention_dropout=1e-9), seed=1)
    again = dropping(tokens, batch_slice=BatchSlice(0, 0, 3))
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-5)


SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {"rope_type": "default"}),
    "part of a head": ({"rotary_fraction": 0.5}, {"rope_type": "default", "partial_rotary_factor": 0.5}),
    "linear": ({"rotary_scaling": "linear", "rotary_scaling_factor": 3.0}, {"rope_type": "linear", "factor": 3.0}),
    "dynamic": (
        {"rotary_scaling": "dynamic", "rotary_scaling_factor": 2.0, "rotary_original_seq_len": 40},
        {"rope_type": "dynamic", "factor": 2.0},
    ),
    "llama3": (
        {
            "rotary_scaling": "llama3", "rotary_scaling_factor": 8.0, "rotary_original_seq_len": 4096,
            "rotary_slow_turns": 1.0, "rotary_fast_turns": 4.0, "rotary_base": 500000.0,
        },
        {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4096, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "rope_theta": 500000.0,
        },
    ),
    "yarn": (
        {"rotary_scaling": "yarn", "rotary_scaling_factor": 16.0, "rotary_original_seq_len": 2048},
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048},
    ),
    "yarn with its own numbers": (
        {
            "rotary_scaling": "yarn", "rotary_scaling_factor": 4.0, "rotary_original_seq_len": 512,
            "rotary_slow_turns": 2.0, "rotary_fast_turns": 20.0, "rotary_attention_factor": 1.3,
        },
        {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_slow": 2.0,
            "beta_fast": 20.0, "attention_factor": 1.3,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("seq_len", [30, 100])
def test_angles_are_those_of_transformers(kind: str, seq_len: int) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig  # noqa: PLC0415 (an extra)
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: PLC0415

    ours, theirs = SCALINGS[kind]
    sizes = {"hidden_size": 128, "num_heads": 2}
    config = GPTConfig(**sizes, position="rotary", **ours)
    cos, sin = rotary_tables(SequenceLayout.whole(seq_len), config, device=torch.device("cpu"))
    parameters = {"rope_theta": 10000.0, **theirs}
    partial = parameters.get("partial_rotary_factor", 1.0)
    if kind == "part of a head":  # Llama itself has none
        parameters["rope_type"], parameters["factor"] = "linear", 1.0
    reference = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=40, rope_parameters=parameters)
    )
    expected = reference(torch.zeros(1, dtype=torch.float32), torch.arange(seq_len)[None])
    pairs = int(64 * partial) // 2
    for table, wanted in zip((cos, sin), expected, strict=True):
        assert table.shape == (seq_len, pairs)
        # transformers' angles are float32: 100 radians have an error of 1e-7.
        torch.testing.assert_close(table, wanted[0, :, :pairs], rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 0}, "head_dim=0 must be 1 or more"),
        ({"hidden_size": 26}, "hidden_size=26 must be divisible by num_heads=4"),
        ({"sliding_window": 0}, "sliding_window=0 must be 1 or more"),
        ({"rotary_scaling": "ntk"}, "rotary_scaling='ntk' must be one of: 'none', 'linear', 'dynamic'"),
        ({"rotary_scaling": "linear", "rotary_scaling_factor": 0.5}, "rotary_scaling_factor=0.5 must be 1 or more"),
        ({"rotary_scaling": "yarn"}, "rotary_original_seq_len=None must be given with rotary_scaling='yarn'"),
        ({"rotary_scaling": "linear", "position": "learned"}, "rotary_scaling='linear' needs position='rotary'"),
        ({**YARN, "rotary_slow_turns": 32.0}, "rotary_slow_turns=32.0 must lie between 0 and rotary_fast_turns=32.0"),
        ({**YARN, "rotary_attention_factor": 0.0}, "rotary_attention_factor=0.0 must be above 0"),
        (
            {"rotary_scaling": "dynamic", "rotary_original_seq_len": 8, "head_dim": 2},
            "rotary_scaling='dynamic' needs more than the 2 rotated elements",
        ),
    ],
    ids=str,
)
def test_fields_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GPTConfig(**{**LLAMA, **changes})
    assert GPTConfig(**{**LLAMA, "hidden_size": 26, "head_dim": 6}).head_size == 6
