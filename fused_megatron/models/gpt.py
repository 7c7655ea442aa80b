"""A GPT from tensor-parallel layers, whole or one pipeline stage of it."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import check
from fused_megatron.collectives import Group, group_size, split_all_gather
from fused_megatron.config import GPTConfig
from fused_megatron.models.attention import Tables
from fused_megatron.models.block import DROPOUT_PLACES, TransformerBlock, norm_of, reset_layers, run_blocks
from fused_megatron.models.dropout import BatchPosition, DropoutMasks, fill_dropout_states_, masks_of_batch
from fused_megatron.models.rotary import rotary_tables
from fused_megatron.models.stage_cut import StageSpan
from fused_megatron.sharding import full_numel
from fused_megatron.tensor_parallel import (
    VocabParallelEmbedding,
    column_parallel_linear,
    fill_normal_shard_,
    parameter_shard,
    vocab_parallel_linear_cross_entropy,
)


class GPT(nn.Module):
    """Decoder-only transformer: learned or rotary positions, pre-norm blocks, tied or untied head.

    Every layout starts from the same full weights, drawn from `seed` and the parameters' names; a stage's parameters
    have the names that they have in the whole model. With tied embeddings the last stage holds a copy of
    token_embedding.weight, whose gradient the caller adds to the first stage's, and that to it.

    Args:
        config: sizes of the whole model; config.vocab_size must be given.
        tp_group: tensor-parallel group of size R; None means one rank.
        sequence_parallel: activations between the tensor-parallel layers are sequence shards [S / R, B, H].
        seed: of the initial weights and of dropout.
        stage: which part of the model this is; None for all of it.

    Communication:
        Per block as TransformerBlock (with recompute="full" its forward once more in backward); one all-reduce for the
        embedding, one backward for the head, and 8 bytes per token and rank for the loss.

    Memory:
        The loss keeps no logits: a tile of them exists at a time.

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
        stage: StageSpan | None = None,
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
        self.stage = stage
        span = stage or StageSpan(0, 1, 0, config.num_layers)
        self.token_embedding = None
        if span.first or (span.last and config.tied_embeddings):
            self.token_embedding = VocabParallelEmbedding(self.vocab_size, config.hidden_size, **vocabulary)
        if self.token_embedding is not None and not span.first:
            weight = self.token_embedding.weight
            self.token_embedding.register_shard("weight", weight, replace(parameter_shard(weight), copy=1))
        self.position_embedding = None if config.position == "rotary" or not span.first else nn.Parameter(
            torch.empty(config.seq_len, config.hidden_size, dtype=dtype, device=device)
        )  # fmt: skip
        # Keyed by the place in the whole model, for the sake of the names.
        self.blocks = nn.ModuleDict({str(i): TransformerBlock(config, **layout) for i in range(span.start, span.stop)})
        self.final_norm = norm_of(config, **layout) if span.last else None
        # An untied head has the shape, shards and padding of an embedding; only its forward differs.
        self.head = None if config.tied_embeddings or not span.last else VocabParallelEmbedding(
            self.vocab_size, config.hidden_size, **vocabulary
        )  # fmt: skip
        # (seed of the place, 0): the embedding, then every block's places.
        states = torch.empty(1 + len(DROPOUT_PLACES) * len(self.blocks), 2, dtype=torch.int64, device=device)
        self.register_buffer("dropout_states", states, persistent=False)
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int) -> None:
        """Draw every weight from (seed, its name); norms are 1, biases 0. Dropout draws from this seed, too."""
        if self.position_embedding is not None:
            fill_normal_shard_(self.position_embedding, self.config.init_std, seed=seed, name="position_embedding")
        self.reset_dropout(seed)
        reset_layers(self, seed)

    def reset_dropout(self, seed: int) -> None:
        """Dropout draws from this seed."""
        places = [f"blocks.{i}.{place}" for i in self.blocks for place in DROPOUT_PLACES]
        fill_dropout_states_(self.get_buffer("dropout_states"), ("embedding", *places), seed)

    def num_parameters(self) -> int:
        """Parameters of the full model or stage, over all tensor-parallel ranks, without vocabulary padding.

        Over all stages the numbers add up to that of the whole model: a copy of a tied embedding counts nothing.
        """
        copied = self.token_embedding if self.stage is not None and not self.stage.first else None
        own = [p for p in self.parameters() if copied is None or p is not copied.weight]
        return full_numel(own)

    def forward(
        self,
        x: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        position: BatchPosition | None = None,
        reduction: str = "none",
    ) -> torch.Tensor:
        """Loss per token or their sum, or this rank's logits; of a stage what it hands on.

        Args:
            x: [B, S] int64 tokens, S at most config.seq_len. A stage that is not the first: what the one before gave.
            target: [B, S] int64, or None. A stage takes none: see loss().
            position: where in training this microbatch lies; dropout needs it, in training mode.
            reduction: "none", or "sum" of the losses, whose gradients cost one product of the head less.

        Returns:
            The whole model: with a target the loss per token [B, S] float32 (0 where target is -100), or with "sum" a
            float64 scalar, the same on every rank; without one logits_shard [B, S, V_padded / R].
            A stage: [S, B, H], or [S / R, B, H] under sequence parallelism; from the last one for loss() and logits().
        """
        hidden = self._hidden(x, position)
        if self.stage is not None:
            check(target is None, "target must be given to the loss() of the last stage, not to a stage's forward")
            return hidden
        return self.logits(hidden) if target is None else self.loss(hidden, target, reduction=reduction)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """logits_shard [B, S, V_padded / R] of the last stage's output, or of the whole model's before the head."""
        weight = self._head().weight
        logits_shard = column_parallel_linear(
            hidden, weight, tp_group=self.tp_group, sequence_parallel=self.sequence_parallel
        )
        return logits_shard.transpose(0, 1)

    def loss(self, hidden: torch.Tensor, target: torch.Tensor, *, reduction: str = "none") -> torch.Tensor:
        """Loss per token [B, S] of the last stage's output, or their sum; target and reduction as in forward."""
        head = self._head()
        loss = vocab_parallel_linear_cross_entropy(
            hidden,
            head.weight,
            target.t(),
            tp_group=self.tp_group,
            vocab_size=self.vocab_size,
            padded_vocab_size=head.padded_num_embeddings,
            sequence_parallel=self.sequence_parallel,
            reduction=reduction,
        )
        return loss.t()

    def _head(self) -> VocabParallelEmbedding:
        head = self.token_embedding if self.head is None else self.head
        check(self.final_norm is not None and head is not None, "only the last stage has a head")
        assert head is not None
        return head

    def _masks(self, batch: int, seq_len: int, position: BatchPosition | None) -> DropoutMasks | None:
        if not (self.training and self.config.has_dropout):
            return None
        group = self.tp_group if self.sequence_parallel else None
        return masks_of_batch(self.get_buffer("dropout_states"), position, batch, seq_len, group)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self.token_embedding is not None
        seq_len = tokens.shape[1]
        check(
            seq_len <= self.config.seq_len, f"tokens.shape[1]={seq_len} must be at most seq_len={self.config.seq_len}"
        )
        # First the tokens: it checks that the sequence divides.
        embedded = self.token_embedding(tokens.t())
        if self.position_embedding is None:
            return embedded
        positions = self.position_embedding[:seq_len]
        if self.sequence_parallel:
            positions = split_all_gather(positions, 0, self.tp_group)
        return embedded + positions.unsqueeze(1)

    def _hidden(self, x: torch.Tensor, position: BatchPosition | None) -> torch.Tensor:
        """[S, B, H], or [S / R, B, H] under sequence parallelism: of the last stage what the head multiplies."""
        first = self.stage is None or self.stage.first
        if first:
            batch, seq_len = x.shape
        else:
            ranks = group_size(self.tp_group) if self.sequence_parallel else 1
            seq_len, batch = x.shape[0] * ranks, x.shape[1]
        masks = self._masks(batch, seq_len, position)
        if first:
            x = self._embed(x)
            if masks is not None and self.config.embedding_dropout > 0:
                x = masks.drop(0, x, self.config.embedding_dropout)
        rest = None if masks is None else masks.rows(1, masks.rng_states.shape[0])
        x = self._blocks(x, rest, self._rotary(seq_len, x))
        return x if self.final_norm is None else self.final_norm(x)

    def _rotary(self, seq_len: int, x: torch.Tensor) -> Tables | None:
        config = self.config
        if config.position != "rotary":
            return None
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return rotary_tables(seq_len, config, device=x.device, dtype=dtype)

    def _blocks(self, x: torch.Tensor, masks: DropoutMasks | None, rotary: Tables | None) -> torch.Tensor:
        recompute = self.config.recompute == "full"
        return run_blocks(self.blocks.values(), x, recompute=recompute, dropout=masks, rotary=rotary)
