"""A GPT from tensor-parallel layers."""

from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_megatron.checks import check
from fused_megatron.collectives import Group, group_rank, group_size, split_all_gather
from fused_megatron.config import GPTConfig
from fused_megatron.models.attention import Tables
from fused_megatron.models.dropout import BatchPosition, DropoutMasks, dropout_seed
from fused_megatron.models.rotary import rotary_tables
from fused_megatron.models.transformer_block import DROPOUT_PLACES, TransformerBlock, norm_of
from fused_megatron.tensor_parallel import (
    ColumnParallelLinear,
    LayerNorm,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel_linear,
    fill_normal_shard_,
    parameter_parts,
    vocab_parallel_linear_cross_entropy,
)


class GPT(nn.Module):
    """Decoder-only transformer: learned or rotary positions, pre-norm blocks, tied or untied head.

    Every tensor-parallel size starts from the same full weights, drawn from `seed` and the parameters' names.

    Args:
        config: sizes; config.vocab_size must be given.
        tp_group: tensor-parallel group of size R; None means one rank.
        sequence_parallel: activations between the tensor-parallel layers are sequence shards [S / R, B, H].
        seed: of the initial weights and of dropout.

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
        self.position_embedding = None if config.position == "rotary" else nn.Parameter(
            torch.empty(config.seq_len, config.hidden_size, dtype=dtype, device=device)
        )  # fmt: skip
        self.blocks = nn.ModuleList(TransformerBlock(config, **layout) for _ in range(config.num_layers))
        self.final_norm = norm_of(config, **layout)
        # An untied head has the shape, shards and padding of an embedding; only its forward differs.
        self.head = None if config.tied_embeddings else VocabParallelEmbedding(
            self.vocab_size, config.hidden_size, **vocabulary
        )  # fmt: skip
        # (seed of the place, 0): the embedding, then every block's places.
        states = torch.empty(1 + len(DROPOUT_PLACES) * config.num_layers, 2, dtype=torch.int64, device=device)
        self.register_buffer("dropout_states", states, persistent=False)
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int) -> None:
        """Draw every weight from (seed, its name); norms are 1, biases 0. Dropout draws from this seed, too."""
        if self.position_embedding is not None:
            fill_normal_shard_(self.position_embedding, self.config.init_std, seed=seed, name="position_embedding")
        self.reset_dropout(seed)
        for name, module in self.named_modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
                module.reset_parameters(seed, f"{name}.weight")
            elif isinstance(module, LayerNorm | RMSNorm):
                module.reset_parameters()

    def reset_dropout(self, seed: int) -> None:
        """Dropout draws from this seed."""
        places = [f"blocks.{i}.{place}" for i in range(len(self.blocks)) for place in DROPOUT_PLACES]
        states = self.get_buffer("dropout_states")
        if not states.is_meta:
            states.copy_(torch.tensor([[dropout_seed(seed, name), 0] for name in ("embedding", *places)]))

    def num_parameters(self) -> int:
        """Parameters of the full model, over all tensor-parallel ranks, without vocabulary padding."""
        return sum(prod(part.shard.full_shape) for p in self.parameters() for part in parameter_parts(p))

    def forward(
        self, tokens: torch.Tensor, target: torch.Tensor | None = None, *, position: BatchPosition | None = None
    ) -> torch.Tensor:
        """Loss per token, or this rank's logits.

        Args:
            tokens: [B, S] int64, S at most config.seq_len.
            target: [B, S] int64, or None.
            position: where in training this microbatch lies; dropout needs it, in training mode.

        Returns:
            With a target the loss per token [B, S] float32 (0 where target is -100), the same on every rank;
            without one logits_shard [B, S, V_padded / R].
        """
        x = self._hidden(tokens, self._masks(tokens, position))
        head = self.token_embedding if self.head is None else self.head
        if target is None:
            logits_shard = column_parallel_linear(
                x, head.weight, tp_group=self.tp_group, sequence_parallel=self.sequence_parallel
            )
            return logits_shard.transpose(0, 1)
        loss = vocab_parallel_linear_cross_entropy(
            x,
            head.weight,
            target.t(),
            tp_group=self.tp_group,
            vocab_size=self.vocab_size,
            padded_vocab_size=self.token_embedding.padded_num_embeddings,
            sequence_parallel=self.sequence_parallel,
        )
        return loss.t()

    def _masks(self, tokens: torch.Tensor, position: BatchPosition | None) -> DropoutMasks | None:
        if not (self.training and self.config.has_dropout):
            return None
        check(
            position is not None,
            "position=None must be given where the model drops elements in training, "
            "as position=BatchPosition(step, first_sample, global_batch_size) (or call eval())",
        )
        assert position is not None
        batch, seq_len = tokens.shape
        check(
            position.first_sample + batch <= position.global_batch_size,
            f"first_sample={position.first_sample} + tokens.shape[0]={batch} must be at most "
            f"global_batch_size={position.global_batch_size}",
        )
        states = self.get_buffer("dropout_states").clone()
        states[:, 1] = position.step
        block = seq_len // group_size(self.tp_group) if self.sequence_parallel else 0
        return DropoutMasks(states, position, block * group_rank(self.tp_group), seq_len)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
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

    def _hidden(self, tokens: torch.Tensor, masks: DropoutMasks | None) -> torch.Tensor:
        """What the head multiplies: [S, B, H], or [S / R, B, H] under sequence parallelism."""
        x = self._embed(tokens)
        if masks is not None and self.config.embedding_dropout > 0:
            x = masks.drop(0, x, self.config.embedding_dropout)
        rest = None if masks is None else masks.rows(1, masks.rng_states.shape[0])
        return self.final_norm(self._blocks(x, rest, self._rotary(tokens.shape[1], x)))

    def _rotary(self, seq_len: int, x: torch.Tensor) -> Tables | None:
        config = self.config
        if config.position != "rotary":
            return None
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return rotary_tables(seq_len, config, device=x.device, dtype=dtype)

    def _blocks(self, x: torch.Tensor, masks: DropoutMasks | None, rotary: Tables | None) -> torch.Tensor:
        recompute = self.config.recompute == "full" and torch.is_grad_enabled()
        places = len(DROPOUT_PLACES)
        for i, block in enumerate(self.blocks):
            inputs: dict[str, Any] = {
                "rotary": rotary,
                "dropout": None if masks is None else masks.rows(i * places, (i + 1) * places),
            }
            if recompute:
                # Nothing in a block draws from torch's generators, so their state need not be kept.
                x = checkpoint(block, x, **inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, **inputs)
        return x
