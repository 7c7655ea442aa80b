"""Start here when a new model family is known in one part of the code and not in another."""

from dataclasses import dataclass

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.config import MODEL_FAMILIES, ModelFamily, TransformerConfig
from fused_megatron.config.config_file import load_config, save_config
from fused_megatron.models import TransformerStack, new_model
from fused_megatron.models.registry import MODELS
from fused_megatron.models.stack import HeadProduct
from fused_megatron.ops.attention import AttentionMask


@dataclass(frozen=True)
class PrefixConfig(TransformerConfig):
    """Model whose prefix tokens attend to each other, and whose other tokens attend to all tokens before them."""

    family: str = "prefix"
    prefix: int = 4


class Prefix(TransformerStack):
    def __init__(self, config, *, layout=None, seed=0, stage=None, dtype=None, device=None):
        super().__init__(config, layout=layout, stage=stage, tied_head=True, dtype=dtype, device=device)
        self.reset_parameters(seed)

    def forward(self, x, target=None, *, batch_slice=None, sequence=None, reduction="none"):
        mask = AttentionMask(causal=True)
        return self._result(self._encode(x, mask, batch_slice=batch_slice, sequence=sequence), target, reduction)

    def _head(self, hidden):
        return HeadProduct(hidden, self.token_embedding.weight, self.token_embedding.padded_num_embeddings)


def test_a_new_family_is_a_row_of_two_tables(monkeypatch, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        '[model]\nfamily = "prefix"\nprefix = 7\nhidden_size = 16\nnum_heads = 2\nvocab_size = 30\nseq_len = 8\n'
    )
    with pytest.raises(InputError, match=r"unknown key model\.prefix"):
        load_config(path)
    monkeypatch.setitem(MODEL_FAMILIES, "prefix", ModelFamily(PrefixConfig, "next_token", generates=False))
    monkeypatch.setitem(MODELS, "prefix", Prefix)
    config = load_config(path, ["--model.num_layers", "1", "--parallel.overlap", "2"])
    assert isinstance(config.model, PrefixConfig) and config.model.prefix == 7 and config.parallel.overlap == 2
    save_config(config, tmp_path / "saved.toml")
    assert load_config(tmp_path / "saved.toml") == config
    model = new_model(config.model, seed=2)
    tokens = torch.arange(16).view(2, 8)
    model(tokens, tokens, reduction="sum").backward()
    assert isinstance(model, Prefix) and all(p.grad is not None for p in model.parameters())
    with pytest.raises(InputError, match=r"prefix is no key of model\.family='gpt'"):
        load_config(path, ["--model.family", "gpt"])
