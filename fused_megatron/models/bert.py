"""A BERT from tensor-parallel layers, whole or one pipeline stage: encoder, masked-LM and next-sentence heads."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fused_megatron import ops
from fused_megatron.checks import check, check_shape
from fused_megatron.collectives import Group, all_gather_split, group_rank, group_size, split_all_gather
from fused_megatron.config import BERTConfig
from fused_megatron.models.block import DROPOUT_PLACES, TransformerBlock, norm_of, reset_layers, run_blocks
from fused_megatron.models.dropout import BatchPosition, DropoutMasks, fill_dropout_states_, masks_of_batch
from fused_megatron.models.rotary import rotary_tables
from fused_megatron.models.stage_cut import StageSpan
from fused_megatron.sharding import full_numel
from fused_megatron.tensor_parallel import (
    ColumnParallelLinear,
    ParameterShard,
    ShardedModule,
    VocabParallelEmbedding,
    column_parallel_linear,
    fill_normal_shard_,
    parameter_shard,
    vocab_parallel_linear_cross_entropy,
)


class BERT(ShardedModule):
    """Bidirectional encoder with a masked-LM head: norm(gelu(linear(x))) times the embedding's weight, plus a bias.

    Every layout starts from the same full weights, drawn from `seed` and the parameters' names; a stage's parameters
    have the names that they have in the whole model. The last stage holds a copy of token_embedding.weight for its
    head, whose gradient the caller adds to the first stage's, and that to it.

    Args:
        config: sizes and forms; config.vocab_size must be given.
        tp_group: tensor-parallel group of size R; None means one rank.
        sequence_parallel: activations between the tensor-parallel layers are sequence shards [S / R, B, H].
        seed: of the initial weights and of dropout.
        stage: which part of the model this is; None for all of it.

    Communication:
        Per block as TransformerBlock (with recompute="full" its forward once more in backward); one all-reduce for the
        embedding; for the head one all-gather of S B H elements forward, one all-reduce for each of its two products
        backward, and 8 bytes per token and rank for the loss.

    Memory:
        The loss keeps no logits: a tile of them exists at a time. The input of the head is whole on every rank.

    Paper: Devlin et al. 2018 (arXiv:1810.04805); the order of norms: Shoeybi et al. 2019, section 3 (arXiv:1909.08053).
    """

    position_embedding: nn.Parameter | None
    token_type_embedding: nn.Parameter | None

    def __init__(
        self,
        config: BERTConfig,
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
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        layout: dict[str, Any] = {**place, "tp_group": tp_group, "sequence_parallel": sequence_parallel}
        self.stage = stage
        span = stage or StageSpan(0, 1, 0, config.num_layers)
        self._add_embeddings(config, layout, place, span)
        self.blocks = nn.ModuleDict(
            {
                str(i): TransformerBlock(config, causal=False, post_norm=config.post_norm, **layout)
                for i in range(span.start, span.stop)
            }
        )
        self.final_norm = norm_of(config, **layout) if span.last and not config.post_norm else None
        self._add_heads(config, layout, span)
        states = torch.empty(1 + len(DROPOUT_PLACES) * len(self.blocks), 2, dtype=torch.int64, device=device)
        self.register_buffer("dropout_states", states, persistent=False)
        self.reset_parameters(seed)

    def _add_embeddings(
        self, config: BERTConfig, layout: dict[str, Any], place: dict[str, Any], span: StageSpan
    ) -> None:
        self.token_embedding = None
        if span.first or (span.last and config.masked_lm_head):
            self.token_embedding = VocabParallelEmbedding(
                self.vocab_size, config.hidden_size, pad_to_multiple_of=config.pad_vocab_size_to_multiple_of,
                init_std=config.init_std, **layout,
            )  # fmt: skip
            if not span.first:
                weight = self.token_embedding.weight
                self.token_embedding.register_shard("weight", weight, replace(parameter_shard(weight), copy=1))
        for name, rows in (
            ("position_embedding", config.seq_len if config.position == "learned" else 0),
            ("token_type_embedding", config.num_token_types),
        ):
            table = nn.Parameter(torch.empty(rows, config.hidden_size, **place)) if rows and span.first else None
            self.register_parameter(name, table)
        self.embedding_norm = norm_of(config, **layout) if span.first and config.post_norm else None

    def _add_heads(self, config: BERTConfig, layout: dict[str, Any], span: StageSpan) -> None:
        hidden = config.hidden_size
        dense: dict[str, Any] = {"init_std": config.init_std, "gather_output": True}
        self.head_transform = self.head_norm = self.pooler = self.next_sentence = None
        if config.masked_lm_head and span.last:
            assert self.token_embedding is not None
            self.head_transform = ColumnParallelLinear(hidden, hidden, **dense, **layout)
            # What it gets is whole and the same on every rank, and so are its gradients.
            self.head_norm = norm_of(config, **{**layout, "sequence_parallel": False})
            weight = self.token_embedding.weight
            self.register_shard(
                "head_bias",
                nn.Parameter(torch.empty_like(weight[:, 0])),
                ParameterShard((self.vocab_size,), (group_rank(self.tp_group) * weight.shape[0],)),
            )
        if config.next_sentence_head and span.last:
            whole = {**layout, "sequence_parallel": False}
            self.pooler = ColumnParallelLinear(hidden, hidden, **dense, **whole)
            # Two features are too few to share.
            self.next_sentence = ColumnParallelLinear(
                hidden, 2, init_std=config.init_std, **{**whole, "tp_group": None}
            )

    def reset_parameters(self, seed: int) -> None:
        """Draw every weight from (seed, its name); norms are 1, biases 0. Dropout draws from this seed, too."""
        for name in ("position_embedding", "token_type_embedding"):
            table = getattr(self, name)
            if table is not None:
                fill_normal_shard_(table, self.config.init_std, seed=seed, name=name)
        if self.head_transform is not None:
            nn.init.zeros_(self.get_parameter("head_bias"))
        reset_layers(self, seed)
        self.reset_dropout(seed)

    def reset_dropout(self, seed: int) -> None:
        """Dropout draws from this seed."""
        places = [f"blocks.{i}.{place}" for i in self.blocks for place in DROPOUT_PLACES]
        fill_dropout_states_(self.get_buffer("dropout_states"), ("embedding", *places), seed)

    def num_parameters(self) -> int:
        """Parameters of the full model or stage, over all tensor-parallel ranks, without vocabulary padding.

        Over all stages the numbers add up to that of the whole model: a copy of the embedding counts nothing.
        """
        copied = self.token_embedding if self.stage is not None and not self.stage.first else None
        own = [p for p in self.parameters() if copied is None or p is not copied.weight]
        return full_numel(own)

    def forward(
        self,
        x: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        token_types: torch.Tensor | None = None,
        is_padding: torch.Tensor | None = None,
        position: BatchPosition | None = None,
        reduction: str = "none",
    ) -> torch.Tensor:
        """Masked-LM loss per token or their sum, or this rank's logits; of a stage what it hands on.

        Args:
            x: as encode: [B, S] int64 tokens, some of them masked, or what the stage before gave.
            target: [B, S] int64, the masked tokens, -100 elsewhere; or None. A stage takes none: see loss().
            token_types, is_padding, position: as encode.
            reduction: "none", or "sum" of the losses, whose gradients cost one product of the head less.

        Returns:
            The whole model: with a target the loss per token [B, S] float32 (0 where target is -100), or with "sum" a
            float64 scalar, the same on every rank; without one logits_shard [B, S, V_padded / R].
            A stage: as encode; from the last one for loss() and logits().
        """
        whole = self.stage is None
        check(
            self.config.masked_lm_head or not whole,
            "masked_lm_head=False: this model has no masked-LM head (use encode)",
        )
        hidden = self.encode(x, token_types=token_types, is_padding=is_padding, position=position)
        if not whole:
            check(target is None, "target must be given to the loss() of the last stage, not to a stage's forward")
            return hidden
        return self.logits(hidden) if target is None else self.loss(hidden, target, reduction=reduction)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """logits_shard [B, S, V_padded / R] of what encode gave."""
        x, weight = self._transformed(hidden)
        return column_parallel_linear(x, weight, self.get_parameter("head_bias"), tp_group=self.tp_group).transpose(
            0, 1
        )

    def loss(self, hidden: torch.Tensor, target: torch.Tensor, *, reduction: str = "none") -> torch.Tensor:
        """Loss per token [B, S] of what encode gave, or their sum; target and reduction as in forward."""
        x, weight = self._transformed(hidden)
        assert self.token_embedding is not None
        loss = vocab_parallel_linear_cross_entropy(
            x, weight, target.t(), bias_shard=self.get_parameter("head_bias"), tp_group=self.tp_group,
            vocab_size=self.vocab_size, padded_vocab_size=self.token_embedding.padded_num_embeddings,
            reduction=reduction,
        )  # fmt: skip
        return loss.t()

    def _transformed(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head multiplies, [S, B, H] on every rank, and its weight."""
        check(self.head_transform is not None, "the masked-LM head belongs to the last stage of a model that has one")
        assert self.head_transform is not None and self.head_norm is not None and self.token_embedding is not None
        approximate = "none" if self.config.activation == "gelu_exact" else "tanh"
        transformed = self.head_transform(hidden)
        assert isinstance(transformed, torch.Tensor)
        return self.head_norm(ops.bias_gelu(transformed, None, approximate)), self.token_embedding.weight

    def encode(
        self,
        x: torch.Tensor,
        *,
        token_types: torch.Tensor | None = None,
        is_padding: torch.Tensor | None = None,
        position: BatchPosition | None = None,
    ) -> torch.Tensor:
        """What the heads read, or the next stage: [S, B, H], or [S / R, B, H] under sequence parallelism.

        Args:
            x: [B, S] int64 tokens, S at most config.seq_len. A stage that is not the first: what the one before gave.
            token_types: [B, S] int64 below config.num_token_types, read by the first stage; None: all 0.
            is_padding: [B, S] bool, True for tokens that none sees; at least one a row is False. For every stage.
            position: where in training this microbatch lies; dropout needs it, in training mode.
        """
        first = self.stage is None or self.stage.first
        if first:
            batch, seq_len = x.shape
            longest = self.config.seq_len
            check(seq_len <= longest, f"tokens.shape[1]={seq_len} must be at most seq_len={longest}")
        else:
            seq_len, batch = x.shape[0] * (group_size(self.tp_group) if self.sequence_parallel else 1), x.shape[1]
        for name, given in (("token_types", token_types), ("is_padding", is_padding)):
            if given is not None:
                check_shape(name, given, (batch, seq_len))
        masks = self._masks(batch, seq_len, position)
        if first:
            x = self._embed(x, token_types)
            if masks is not None and self.config.embedding_dropout > 0:
                x = masks.drop(0, x, self.config.embedding_dropout)
        rest = None if masks is None else masks.rows(1, masks.rng_states.shape[0])
        rotary = None
        if self.config.position == "rotary":
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            rotary = rotary_tables(seq_len, self.config, device=x.device, dtype=dtype)
        recompute = self.config.recompute == "full"
        x = run_blocks(
            self.blocks.values(), x, recompute=recompute, dropout=rest, rotary=rotary, hidden_keys=is_padding
        )
        return x if self.final_norm is None else self.final_norm(x)

    def next_sentence_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, 2], the same on every rank, from what encode gave: (it follows, it does not).

        Communication: under sequence parallelism one all-gather of hidden.
        """
        check(self.pooler is not None, "next_sentence_head=False: this model has no next-sentence head")
        assert self.pooler is not None and self.next_sentence is not None
        whole = all_gather_split(hidden, 0, self.tp_group) if self.sequence_parallel else hidden
        logits = self.next_sentence(torch.tanh(self.pooler(whole[0])))
        assert isinstance(logits, torch.Tensor)
        return logits

    def _embed(self, tokens: torch.Tensor, token_types: torch.Tensor | None) -> torch.Tensor:
        assert self.token_embedding is not None
        # First the tokens: it checks that the sequence divides.
        x = self.token_embedding(tokens.t()) + self._positions_and_types(tokens, token_types)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _positions_and_types(self, tokens: torch.Tensor, token_types: torch.Tensor | None) -> torch.Tensor | float:
        """What is added to the embedded tokens, [S, B or 1, H] or this rank's block of it."""
        added: torch.Tensor | float = 0.0
        position_embedding, type_embedding = self.position_embedding, self.token_type_embedding
        if position_embedding is not None:
            added = position_embedding[: tokens.shape[1]].unsqueeze(1)
        check(token_types is None or type_embedding is not None, "token_types must be None where num_token_types=0")
        if type_embedding is not None:
            types = torch.zeros_like(tokens) if token_types is None else token_types
            added = added + F.embedding(types.t(), type_embedding)
        if self.sequence_parallel and isinstance(added, torch.Tensor):
            return split_all_gather(added, 0, self.tp_group)
        return added

    def _masks(self, batch: int, seq_len: int, position: BatchPosition | None) -> DropoutMasks | None:
        if not (self.training and self.config.has_dropout):
            return None
        group = self.tp_group if self.sequence_parallel else None
        return masks_of_batch(self.get_buffer("dropout_states"), position, batch, seq_len, group)
