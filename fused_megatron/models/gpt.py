"""A GPT from tensor-parallel layers."""

from math import prod
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import check
from fused_megatron.collectives import Group, split_all_gather
from fused_megatron.config import GPTConfig
from fused_megatron.models.transformer_block import TransformerBlock
from fused_megatron.tensor_parallel import (
    ColumnParallelLinear,
    LayerNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel_linear,
    fill_normal_shard_,
    parameter_shard,
    vocab_parallel_cross_entropy,
)


class GPT(nn.Module):
    """Decoder-only transformer: learned positions, pre-norm blocks, tied or untied head.

    Every tensor-parallel size starts from the same full weights, drawn from `seed` and the parameters' names.

    Args:
        config: sizes; config.vocab_size must be given.
        tp_group: tensor-parallel group of size R; None means one rank.
        sequence_parallel: activations between the tensor-parallel layers are sequence shards [S / R, B, H].
        seed: of the initial weights.

    Communication:
        Per block as TransformerBlock; one all-reduce for the embedding, one backward for the head, and
        8 bytes per token and rank for the loss.

    Paper: Shoeybi et al. 2019, Megatron-LM (arXiv:1909.08053); Korthikanti et al. 2022 for sequence parallelism
    (arXiv:2205.05198).
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        tp_group: Group = None,
        sequence_parallel: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        check(config.vocab_size is not None, "vocab_size=None must be given to build a model")
        self.config = config
        self.vocab_size = int(config.vocab_size or 0)
        self.tp_group = tp_group
        self.sequence_parallel = sequence_parallel and tp_group is not None
        layout: dict[str, Any] = {
            "tp_group": tp_group,
            "sequence_parallel": sequence_parallel,
            "dtype": dtype,
            "device": device,
        }
        vocabulary: dict[str, Any] = {
            **layout,
            "pad_to_multiple_of": config.pad_vocab_size_to_multiple_of,
            "init_std": config.init_std,
        }
        self.token_embedding = VocabParallelEmbedding(self.vocab_size, config.hidden_size, **vocabulary)
        self.position_embedding = nn.Parameter(
            torch.empty(config.seq_len, config.hidden_size, dtype=dtype, device=device)
        )
        self.blocks = nn.ModuleList(TransformerBlock(config, **layout) for _ in range(config.num_layers))
        self.final_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **layout)
        # An untied head has the shape, shards and padding of an embedding; only its forward differs.
        self.head = None if config.tied_embeddings else VocabParallelEmbedding(
            self.vocab_size, config.hidden_size, **vocabulary
        )  # fmt: skip
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int) -> None:
        """Draw every weight from (seed, its name); norms are 1, biases 0."""
        fill_normal_shard_(self.position_embedding, self.config.init_std, seed=seed, name="position_embedding")
        for name, module in self.named_modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
                module.reset_parameters(seed, f"{name}.weight")
            elif isinstance(module, LayerNorm):
                module.reset_parameters()

    def num_parameters(self) -> int:
        """Parameters of the full model, over all tensor-parallel ranks, without vocabulary padding."""
        return sum(prod(parameter_shard(p).full_shape) for p in self.parameters())

    def forward(self, tokens: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """Loss per token, or this rank's logits.

        Args:
            tokens: [B, S] int64, S at most config.seq_len.
            target: [B, S] int64, or None.

        Returns:
            With a target the loss per token [B, S] float32 (0 where target is -100), the same on every rank;
            without one logits_shard [B, S, V_padded / R].
        """
        logits_shard = self._logits_shard(self._embed(tokens))
        if target is None:
            return logits_shard.transpose(0, 1)
        loss = vocab_parallel_cross_entropy(
            logits_shard,
            target.t(),
            tp_group=self.tp_group,
            vocab_size=self.vocab_size,
            padded_vocab_size=self.token_embedding.padded_num_embeddings,
        )
        return loss.t()

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        seq_len = tokens.shape[1]
        check(
            seq_len <= self.config.seq_len, f"tokens.shape[1]={seq_len} must be at most seq_len={self.config.seq_len}"
        )
        # First the tokens: it checks that the sequence divides.
        embedded = self.token_embedding(tokens.t())
        positions = self.position_embedding[:seq_len]
        if self.sequence_parallel:
            positions = split_all_gather(positions, 0, self.tp_group)
        return embedded + positions.unsqueeze(1)

    def _logits_shard(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        head = self.token_embedding if self.head is None else self.head
        return column_parallel_linear(
            self.final_norm(x), head.weight, None, tp_group=self.tp_group, sequence_parallel=self.sequence_parallel
        )
