"""A BERT from tensor-parallel layers: an encoder, the masked-LM head and its loss, the next-sentence head."""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fused_megatron import ops
from fused_megatron.checks import check, check_shape
from fused_megatron.collectives import Group, all_gather_split, group_rank, split_all_gather
from fused_megatron.config import BERTConfig
from fused_megatron.models.dropout import BatchPosition, DropoutMasks, fill_dropout_states_, masks_of_batch
from fused_megatron.models.rotary import rotary_tables
from fused_megatron.models.transformer_block import DROPOUT_PLACES, TransformerBlock, norm_of, reset_layers, run_blocks
from fused_megatron.tensor_parallel import (
    ColumnParallelLinear,
    ParameterShard,
    ShardedModule,
    VocabParallelEmbedding,
    column_parallel_linear,
    fill_normal_shard_,
    parameter_parts,
    vocab_parallel_linear_cross_entropy,
)


class BERT(ShardedModule):
    """Bidirectional encoder with a masked-LM head: norm(gelu(linear(x))) times the embedding's weight, plus a bias.

    Every tensor-parallel size starts from the same full weights, drawn from `seed` and the parameters' names.

    Args:
        config: sizes and forms; config.vocab_size must be given.
        tp_group: tensor-parallel group of size R; None means one rank.
        sequence_parallel: activations between the tensor-parallel layers are sequence shards [S / R, B, H].
        seed: of the initial weights and of dropout.

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
        hidden = config.hidden_size
        self.token_embedding = VocabParallelEmbedding(
            self.vocab_size, hidden, pad_to_multiple_of=config.pad_vocab_size_to_multiple_of,
            init_std=config.init_std, **layout,
        )  # fmt: skip
        for name, rows in (
            ("position_embedding", config.seq_len if config.position == "learned" else 0),
            ("token_type_embedding", config.num_token_types),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(rows, hidden, **place)) if rows else None)
        self.embedding_norm = norm_of(config, **layout) if config.post_norm else None
        self.blocks = nn.ModuleDict(
            {
                str(i): TransformerBlock(config, causal=False, post_norm=config.post_norm, **layout)
                for i in range(config.num_layers)
            }
        )
        self.final_norm = None if config.post_norm else norm_of(config, **layout)
        self._add_heads(config, layout)
        states = torch.empty(1 + len(DROPOUT_PLACES) * config.num_layers, 2, dtype=torch.int64, device=device)
        self.register_buffer("dropout_states", states, persistent=False)
        self.reset_parameters(seed)

    def _add_heads(self, config: BERTConfig, layout: dict[str, Any]) -> None:
        hidden = config.hidden_size
        dense: dict[str, Any] = {"init_std": config.init_std, "gather_output": True}
        self.head_transform = self.head_norm = self.pooler = self.next_sentence = None
        if config.masked_lm_head:
            self.head_transform = ColumnParallelLinear(hidden, hidden, **dense, **layout)
            # What it gets is whole and the same on every rank, and so are its gradients.
            self.head_norm = norm_of(config, **{**layout, "sequence_parallel": False})
            weight = self.token_embedding.weight
            self.register_shard(
                "head_bias",
                nn.Parameter(torch.empty_like(weight[:, 0])),
                ParameterShard((self.vocab_size,), (group_rank(self.tp_group) * weight.shape[0],)),
            )
        if config.next_sentence_head:
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
        if self.config.masked_lm_head:
            nn.init.zeros_(self.get_parameter("head_bias"))
        reset_layers(self, seed)
        self.reset_dropout(seed)

    def reset_dropout(self, seed: int) -> None:
        """Dropout draws from this seed."""
        places = [f"blocks.{i}.{place}" for i in self.blocks for place in DROPOUT_PLACES]
        fill_dropout_states_(self.get_buffer("dropout_states"), ("embedding", *places), seed)

    def num_parameters(self) -> int:
        """Parameters over all tensor-parallel ranks, without vocabulary padding."""
        return sum(prod(part.shard.full_shape) for p in self.parameters() for part in parameter_parts(p))

    def forward(
        self,
        tokens: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        token_types: torch.Tensor | None = None,
        is_padding: torch.Tensor | None = None,
        position: BatchPosition | None = None,
    ) -> torch.Tensor:
        """Masked-LM loss per token, or this rank's logits.

        Args:
            tokens: [B, S] int64, S at most config.seq_len; some of them masked.
            target: [B, S] int64, the masked tokens, -100 elsewhere; or None.
            token_types, is_padding, position: as encode.

        Returns:
            With a target the loss per token [B, S] float32 (0 where target is -100), the same on every rank;
            without one logits_shard [B, S, V_padded / R].
        """
        check(self.head_transform is not None, "masked_lm_head=False: this model has no masked-LM head (use encode)")
        assert self.head_transform is not None and self.head_norm is not None
        hidden = self.encode(tokens, token_types=token_types, is_padding=is_padding, position=position)
        approximate = "none" if self.config.activation == "gelu_exact" else "tanh"
        transformed = self.head_transform(hidden)
        assert isinstance(transformed, torch.Tensor)
        x = self.head_norm(ops.bias_gelu(transformed, None, approximate))
        weight, bias = self.token_embedding.weight, self.get_parameter("head_bias")
        if target is None:
            return column_parallel_linear(x, weight, bias, tp_group=self.tp_group).transpose(0, 1)
        loss = vocab_parallel_linear_cross_entropy(
            x, weight, target.t(), bias_shard=bias, tp_group=self.tp_group, vocab_size=self.vocab_size,
            padded_vocab_size=self.token_embedding.padded_num_embeddings,
        )  # fmt: skip
        return loss.t()

    def encode(
        self,
        tokens: torch.Tensor,
        *,
        token_types: torch.Tensor | None = None,
        is_padding: torch.Tensor | None = None,
        position: BatchPosition | None = None,
    ) -> torch.Tensor:
        """What the heads read: [S, B, H], or [S / R, B, H] under sequence parallelism.

        Args:
            tokens: [B, S] int64, S at most config.seq_len.
            token_types: [B, S] int64 below config.num_token_types; None: all 0.
            is_padding: [B, S] bool, True for tokens that none sees; at least one a row is False.
            position: where in training this microbatch lies; dropout needs it, in training mode.
        """
        batch, seq_len = tokens.shape
        check(
            seq_len <= self.config.seq_len, f"tokens.shape[1]={seq_len} must be at most seq_len={self.config.seq_len}"
        )
        for name, given in (("token_types", token_types), ("is_padding", is_padding)):
            if given is not None:
                check_shape(name, given, tokens.shape)
        masks = self._masks(batch, seq_len, position)
        # First the tokens: it checks that the sequence divides.
        x = self.token_embedding(tokens.t()) + self._positions_and_types(tokens, token_types)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
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
