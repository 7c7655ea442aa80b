"""Start here when the FLOPs of a model, and so its MFU, are wrong."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig
from fused_megatron.models import GPT
from fused_megatron.observe.model_flops import gpt_step_flops

BATCH = 2
FORMS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2, "head_dim": 24, "activation": "swiglu", "ffn_hidden_size": 48, "tied_embeddings": False},
    {"position": "rotary", "rotary_fraction": 0.5, "normalization": "rms_norm", "activation": "geglu"},
    {"linear_biases": False, "activation": "gelu_exact", "num_kv_heads": 1},
]


def config_of(form: dict[str, Any], recompute: str) -> GPTConfig:
    return GPTConfig(num_layers=3, hidden_size=64, num_heads=4, seq_len=32, vocab_size=100, recompute=recompute, **form)


def counted(config: GPTConfig, backend: SDPBackend = SDPBackend.MATH) -> int:
    """Count the FLOPs of a step's products with torch's own counter."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {
        flash: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        # The scores that the kernel recomputes do not count: four products of five.
        flash_backward: lambda dy, *qkv, **_: sdpa_backward_flop_count(dy, *qkv[:3]) * 4 // 5,
    }
    model = GPT(config)
    tokens = torch.zeros(BATCH, config.seq_len, dtype=torch.int64)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, sdpa_kernel(backend):
        model(tokens, tokens, reduction="sum").backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("form", FORMS, ids=["gpt2", "swiglu_gqa_untied", "geglu_rotary", "mqa_without_biases"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_hardware_flops_equal_the_count_of_torch(form: dict[str, Any], recompute: str) -> None:
    config = config_of(form, recompute)
    model_flops, hardware_flops = gpt_step_flops(config, BATCH * config.seq_len)
    assert hardware_flops == counted(config)
    assert gpt_step_flops(config, BATCH * config.seq_len, recompute="none") == (model_flops, model_flops)


def test_selective_recomputation_with_a_fused_kernel() -> None:
    config = config_of({}, "selective")
    assert gpt_step_flops(config, BATCH * config.seq_len)[1] == counted(config, SDPBackend.FLASH_ATTENTION)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_visible_pairs_of_short_documents_cost_what_short_sequences_cost(recompute: str) -> None:
    long, tokens = config_of(FORMS[1], recompute), 12 * BATCH * config_of(FORMS[1], recompute).seq_len
    short = dataclasses.replace(long, seq_len=long.seq_len // 4)
    assert gpt_step_flops(long, tokens, visible_pairs=tokens * short.seq_len) == gpt_step_flops(short, tokens)
    assert gpt_step_flops(long, tokens, visible_pairs=tokens * long.seq_len) == gpt_step_flops(long, tokens)


def test_formulas_of_the_papers() -> None:
    """The 175B GPT-3 of Narayanan et al. 2021 and Korthikanti et al. 2022."""
    b, s, layers, h, v = 1536, 2048, 96, 12288, 51200
    config = GPTConfig(num_layers=layers, hidden_size=h, num_heads=96, seq_len=s, vocab_size=v)
    model, hardware = gpt_step_flops(config, b * s, recompute="full")
    assert model == pytest.approx(72 * b * s * layers * h * h * (1 + s / (6 * h) + v / (12 * layers * h)), rel=1e-12)
    assert hardware == pytest.approx(96 * b * s * layers * h * h * (1 + s / (6 * h) + v / (16 * layers * h)), rel=1e-12)
    # PaLM, appendix B: 6 N + 12 L H Q T per token, with H heads of size Q: H Q is the width.
    products = layers * 12 * h * h + v * h
    assert model // (b * s) == 6 * products + 12 * layers * h * s


def test_refused() -> None:
    config = GPTConfig(num_layers=1, hidden_size=8, num_heads=1, seq_len=4, vocab_size=10)
    with pytest.raises(InputError, match="recompute='some' must be"):
        gpt_step_flops(config, 4, recompute="some")
    with pytest.raises(InputError, match="vocab_size=None must be given"):
        gpt_step_flops(GPTConfig(), 4)
    with pytest.raises(InputError, match="visible_pairs=17 must be at most num_tokens x seq_len=16"):
        gpt_step_flops(config, 4, visible_pairs=17)
