"""Base class of the models: embedding, transformer blocks and loss of a whole model or of one pipeline stage."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from fused_megatron.checks import check, check_dtype, check_shape
from fused_megatron.collectives import group_rank, group_size, split_all_gather
from fused_megatron.config import TransformerConfig
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models.attention import Tables
from fused_megatron.models.block import DROPOUT_SITES, TransformerBlock, norm_of, reset_layers, run_blocks
from fused_megatron.models.dropout import BatchSlice, DropoutMasks, fill_dropout_states_, masks_of_batch
from fused_megatron.models.key_value_cache import KeyValueCache
from fused_megatron.models.residual_stream import OpenSum, closed, norm_and_stream
from fused_megatron.models.rotary import KeptTables, rotary_tables
from fused_megatron.models.stage_cut import StageSpan
from fused_megatron.modules.auxiliary_loss import WithAuxiliaryLoss, split_auxiliary_loss
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.sharding import (
    SequenceLayout,
    SequencePartition,
    ShardedModule,
    fill_normal_shard_,
    full_numel,
    mark_all_shards,
    parameter_shard,
)
from fused_megatron.tensor_parallel import (
    VocabParallelEmbedding,
    column_parallel_linear,
    vocab_parallel_linear_cross_entropy,
)


@dataclass(frozen=True)
class HeadProduct:
    """Operands of the matrix product that ends a model: logits_shard = x weight^T + bias.

    Attributes:
        x: [S, B, H], or the sequence shard [S / R, B, H].
        weight: [V_padded / R, H], this rank's shard.
        padded_vocab_size: V_padded.
        bias: [V_padded / R], this rank's shard, or None.
        sequence_parallel: True if x is a sequence shard.
    """

    x: torch.Tensor
    weight: torch.Tensor
    padded_vocab_size: int
    bias: torch.Tensor | None = None
    sequence_parallel: bool = False


class TransformerStack(ShardedModule):
    """Token embedding, blocks and loss. A model family adds its head and its attention mask.

    Every layout starts from the same full weights, drawn from `seed` and the parameters' names. A parameter of a stage
    has its name in the whole model. If the head shares the weight of the embedding, the last stage holds a copy of
    token_embedding.weight. The caller sums the gradients of both copies and gives the sum to both stages.

    Args:
        config: sizes of the whole model; config.vocab_size must be given.
        layout: how the model is cut over ranks; None: not at all.
        stage: the part of the model to build; None: all of it.
        tied_head: True if the head needs token_embedding.weight.
        num_token_types: rows of the token type embedding; 0: the model has none.
        post_norm: put norms after the residual additions and the embedding, instead of before attention, MLP and head.
        dtype, device: of the parameters.

    Attributes:
        span: the blocks of this stage; all blocks in a whole model.
        num_recomputed: number of its first blocks that are recomputed as config.recompute says.
    """

    position_embedding: nn.Parameter | None
    token_type_embedding: nn.Parameter | None

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layout: ParallelLayout | None,
        stage: StageSpan | None,
        tied_head: bool,
        num_token_types: int = 0,
        post_norm: bool = False,
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        check(config.vocab_size is not None, "vocab_size=None must be given to build a model")
        layout = layout or ParallelLayout()
        self.layout = replace(layout, sequence_parallel=layout.sequence_parallel and layout.tp_group is not None)
        self.config, self.vocab_size = config, int(config.vocab_size or 0)
        self.tp_group, self.sequence_parallel = self.layout.tp_group, self.layout.sequence_parallel
        self._kept_tables = KeptTables()
        self.stage, self.span = stage, stage or StageSpan(0, 1, 0, config.num_layers)
        first, last = self.span.first, self.span.last
        self.token_embedding = None
        if first or (last and tied_head):
            self.token_embedding = self._vocabulary_table(dtype, device)
        if self.token_embedding is not None and not first:
            weight = self.token_embedding.weight
            self.token_embedding.register_shard("weight", weight, replace(parameter_shard(weight), copy=1))
        positions = config.seq_len if config.position == "learned" else 0
        for name, rows in (("position_embedding", positions), ("token_type_embedding", num_token_types)):
            values = torch.empty(rows, config.hidden_size, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(values) if first and rows else None)
        self.embedding_norm = self.final_norm = None
        if first and post_norm:
            self.embedding_norm = norm_of(config, layout=self.layout, dtype=dtype, device=device)
        self.num_recomputed = config.recomputed_blocks(self.span.stop - self.span.start)
        kept = replace(config, recompute="none", recompute_blocks=None)
        # Keyed by the index in the whole model, so that parameters have the same names in every stage cut.
        self.blocks = nn.ModuleDict(
            {
                str(self.span.start + i): TransformerBlock(
                    config if i < self.num_recomputed else kept,
                    layout=self.layout,
                    index=self.span.start + i,
                    post_norm=post_norm,
                    dtype=dtype,
                    device=device,
                )
                for i in range(self.span.stop - self.span.start)
            }
        )
        if last and not post_norm:
            self.final_norm = norm_of(config, layout=self.layout, dtype=dtype, device=device)
        # A row (seed of the dropout site, 0) for the embedding, then for every dropout site of every block.
        states = torch.empty(1 + len(DROPOUT_SITES) * len(self.blocks), 2, dtype=torch.int64, device=device)
        self.register_buffer("dropout_states", states, persistent=False)

    def _vocabulary_table(self, dtype: torch.dtype | None, device: torch.device | None) -> VocabParallelEmbedding:
        return VocabParallelEmbedding(
            self.vocab_size,
            self.config.hidden_size,
            pad_to_multiple_of=self.config.pad_vocab_size_to_multiple_of,
            init_std=self.config.init_std,
            tp_group=self.layout.tp_group,
            sequence_parallel=self.layout.sequence_parallel,
            dtype=dtype,
            device=device,
        )

    def reset_parameters(self, seed: int) -> None:
        """Draw every weight from (seed, its name), set norms to 1 and biases to 0, and give dropout the same seed."""
        mark_all_shards(self)
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.dim() > 1:
                fill_normal_shard_(parameter, self.config.init_std, seed=seed, name=name)
            else:
                nn.init.zeros_(parameter)
        self.reset_dropout(seed)
        reset_layers(self, seed)

    def reset_dropout(self, seed: int) -> None:
        """Let dropout draw its masks from this seed."""
        self.dropout_seed = seed
        sites = [f"blocks.{i}.{site}" for i in self.blocks for site in DROPOUT_SITES]
        fill_dropout_states_(self.get_buffer("dropout_states"), ("embedding", *sites), seed)

    def num_parameters(self) -> int:
        """Count the parameters of the model or stage over all tensor-parallel ranks, without vocabulary padding.

        The counts of all stages add up to the count of the whole model: a copy of a tied embedding is not counted.
        """
        mark_all_shards(self)
        copied = None if self.span.first else self.token_embedding
        own = [p for p in self.parameters() if copied is None or p is not copied.weight]
        return full_numel(own)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits_shard [B, S, V_padded / R].

        Args:
            hidden: the output of the last stage, or of a whole model's last norm.
        """
        head = self._head(hidden)
        logits_shard = column_parallel_linear(
            head.x,
            head.weight,
            head.bias,
            tp_group=self.tp_group,
            sequence_parallel=head.sequence_parallel,
            overlap=self.layout.overlap,
        )
        return logits_shard.transpose(0, 1)

    def next_logits(self, hidden: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        """Compute logits_shard [B, 1, V_padded / R] of the token after each sequence's last new token.

        Args:
            hidden: as in logits(), of the new tokens.
            cache: what the forward of these tokens was given.
        """
        if not self.sequence_parallel:
            return self.logits(cache.last(hidden))
        return cache.last(self.logits(hidden).transpose(0, 1)).transpose(0, 1)

    def loss(self, hidden: torch.Tensor, target: torch.Tensor, *, reduction: str = "none") -> torch.Tensor:
        """Compute the loss per token [B, S], or the sum of the losses.

        Args:
            hidden: as in logits().
            target, reduction: as in forward().
        """
        head = self._head(hidden)
        loss = vocab_parallel_linear_cross_entropy(
            head.x,
            head.weight,
            target.t(),
            bias_shard=head.bias,
            tp_group=self.tp_group,
            vocab_size=self.vocab_size,
            padded_vocab_size=head.padded_vocab_size,
            sequence_parallel=head.sequence_parallel,
            reduction=reduction,
        )
        return loss.t()

    def attention_mask(
        self, *, key_padding_mask: torch.Tensor | None = None, documents: torch.Tensor | None = None
    ) -> AttentionMask:
        """Return the mask of a microbatch with this padding and these documents, as AttentionMask takes them."""
        raise NotImplementedError

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that loss() reads itself, and not through a module's forward; [] without a head."""
        raise NotImplementedError

    def _head(self, hidden: torch.Tensor) -> HeadProduct:
        """Return the operands of the product that computes logits from the last stage's output.

        Raises:
            InputError: this stage has no head.
        """
        raise NotImplementedError

    def _result(
        self, encoded: torch.Tensor | WithAuxiliaryLoss, target: torch.Tensor | None, reduction: str
    ) -> torch.Tensor | WithAuxiliaryLoss:
        """Turn the output of _encode into the result of forward: hidden states of a stage, or loss or logits."""
        if self.stage is not None:
            check(target is None, "target must be given to the loss() of the last stage, not to a stage's forward")
            return encoded
        hidden, auxiliary = split_auxiliary_loss(encoded)
        result = self.logits(hidden) if target is None else self.loss(hidden, target, reduction=reduction)
        return result if auxiliary is None else WithAuxiliaryLoss(result, auxiliary)

    def _encode(
        self,
        x: torch.Tensor,
        mask: AttentionMask,
        *,
        token_types: torch.Tensor | None = None,
        batch_slice: BatchSlice | None,
        sequence: SequenceLayout | None,
        partition: SequencePartition | None = None,
        positions: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor | WithAuxiliaryLoss:
        """Run this stage: return [S, B, H], or [S / R, B, H] under sequence parallelism.

        Args:
            x: tokens [B, S] for the first stage, the output of the previous stage for the others.
            token_types: [B, S] int64, rows of token_type_embedding; None: all 0. Only the first stage reads them.
            batch_slice: the rows of the global batch in this microbatch.
            sequence: positions of the S tokens in a longer sequence; None: the S tokens are the whole sequence.
            partition: the positions of each context-parallel rank, in place of `sequence`; None: every rank has the
                whole sequence.
            positions: [B, S] int64, positions for the embedding or rotation; None: the positions in `sequence`.
            cache: keys and values of earlier tokens, without gradients; None: x has all tokens.

        Raises:
            InputError: shapes that do not fit; a partition for another number of ranks; no partition where gradients
                would count once for every context-parallel rank.
        """
        if cache is not None:
            check(not (torch.is_grad_enabled() or self.training), "cache must be None in training: it has no gradient")
            sequence, positions = cache.positions(self.config.seq_len, x.device)
        sequence = self._part_of_rank(partition) or sequence
        batch, sequence = self._batch_and_sequence(x, sequence)
        if token_types is not None:
            check_shape("token_types", token_types, (batch, sequence.num_positions))
        if mask.key_padding_mask is not None:
            check_shape("key_padding_mask", mask.key_padding_mask, (batch, sequence.num_positions))
        if positions is not None:
            self._check_positions(positions, (batch, sequence.num_positions))
        masks = self._masks(batch, sequence, batch_slice)
        if self.span.first:
            x = self._embed(x, sequence, token_types, positions)
            if masks is not None and self.config.embedding_dropout > 0:
                x = masks.drop(0, x, self.config.embedding_dropout)
        stream, auxiliary = self._blocks(x, mask, masks, self._rotary(sequence, x, positions, cache), partition, cache)
        # A stage sends one tensor.
        x = closed(stream) if self.final_norm is None else norm_and_stream(self.final_norm, stream)[0]
        return x if auxiliary is None else WithAuxiliaryLoss(x, auxiliary)

    def _part_of_rank(self, partition: SequencePartition | None) -> SequenceLayout | None:
        """Return the positions of this context-parallel rank; None if every rank has the whole sequence."""
        ranks = group_size(self.layout.cp_group)
        if partition is None:
            check(
                ranks == 1 or not torch.is_grad_enabled(),
                f"partition=None must be given for the {ranks} ranks of cp_group: each would train on the whole "
                "sequence (torch.no_grad() for a forward without gradients)",
            )
            return None
        check(partition.num_ranks == ranks, f"partition has {partition.num_ranks} ranks, and cp_group has {ranks}")
        return partition.layouts[group_rank(self.layout.cp_group)]

    def _batch_and_sequence(self, x: torch.Tensor, sequence: SequenceLayout | None) -> tuple[int, SequenceLayout]:
        """Return B and the positions of the tokens that the tensor-parallel ranks hold together."""
        if self.span.first:
            batch, rows = x.shape
        else:
            rows, batch = x.shape[:2]
            if self.sequence_parallel:
                rows *= group_size(self.tp_group)
        longest = self.config.seq_len
        if sequence is None:
            check(not self.span.first or rows <= longest, f"tokens.shape[1]={rows} must be at most seq_len={longest}")
            return batch, SequenceLayout.whole(rows)
        check(
            sequence.num_positions == rows and sequence.seq_len <= longest,
            f"sequence={sequence} must have {rows} positions, as many as there are tokens, and at most "
            f"seq_len={longest}",
        )
        return batch, sequence

    def _check_positions(self, positions: torch.Tensor, shape: tuple[int, int]) -> None:
        check_dtype("positions", positions, (torch.int64,))
        check_shape("positions", positions, shape)
        if torch.compiler.is_compiling() or type(positions) is not torch.Tensor:
            return
        if positions.device.type == "cpu" and positions.numel():  # on a GPU the host would wait
            lowest, highest = (int(bound) for bound in positions.aminmax())
            check(
                lowest >= 0 and highest < self.config.seq_len,
                f"positions from {lowest} to {highest} must lie in [0, seq_len={self.config.seq_len})",
            )

    def _own(self, sequence: SequenceLayout) -> SequenceLayout:
        """Return the positions of this rank's activations between the tensor-parallel layers."""
        if not self.sequence_parallel:
            return sequence
        return sequence.block(group_rank(self.tp_group), group_size(self.tp_group))

    def _masks(self, batch: int, sequence: SequenceLayout, batch_slice: BatchSlice | None) -> DropoutMasks | None:
        if not (self.training and self.config.has_dropout):
            return None
        return masks_of_batch(
            self.get_buffer("dropout_states"),
            batch_slice,
            batch,
            self._own(sequence),
            seed=self.dropout_seed,
            first_site=len(DROPOUT_SITES) * self.span.start,
        )

    def _embed(
        self,
        tokens: torch.Tensor,
        sequence: SequenceLayout,
        token_types: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        assert self.token_embedding is not None
        # Embed the tokens first: token_embedding checks that the ranks divide the sequence.
        x = self.token_embedding(tokens.t())
        added = self._positions_and_types(tokens, sequence, token_types, positions)
        if added is not None:
            if self.sequence_parallel:
                added = split_all_gather(added, 0, self.tp_group)
            x = x + added
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _positions_and_types(
        self,
        tokens: torch.Tensor,
        sequence: SequenceLayout,
        token_types: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Sum the position and token type embeddings, [S, B or 1, H]; None if the model has neither."""
        check(
            token_types is None or self.token_type_embedding is not None,
            "token_types must be None where num_token_types=0",
        )
        position_rows = None
        types = None
        if self.position_embedding is not None and positions is not None:
            position_rows = F.embedding(positions.t(), self.position_embedding)
        elif self.position_embedding is not None:
            position_rows = sequence.take(self.position_embedding).unsqueeze(1)
        if self.token_type_embedding is not None:
            kinds = torch.zeros_like(tokens) if token_types is None else token_types
            types = F.embedding(kinds.t(), self.token_type_embedding)
        if position_rows is None or types is None:
            return position_rows if types is None else types
        return position_rows + types

    def _rotary(
        self,
        sequence: SequenceLayout,
        x: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tables | None:
        if self.config.position != "rotary":
            return None
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if cache is not None:
            # A sequence of 1: with a cache dynamic scaling never reaches a length that changes the frequencies.
            one = SequenceLayout.whole(1)
            return cache.rotary(
                lambda each: rotary_tables(one, self.config, device=x.device, dtype=dtype, positions=each),
                sequence,
                positions,
                x.device,
            )
        if positions is None:
            return self._kept_tables.of(sequence, self.config, x, dtype)
        return rotary_tables(sequence, self.config, device=x.device, dtype=dtype, positions=positions)

    def _blocks(
        self,
        x: torch.Tensor,
        mask: AttentionMask,
        masks: DropoutMasks | None,
        rotary: Tables | None,
        partition: SequencePartition | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[torch.Tensor | OpenSum, torch.Tensor | None]:
        """Run all blocks; return x, whose last addition may be open, and the sum of the auxiliary losses.

        Args:
            masks: dropout masks of the embedding (row 0) and of all blocks.
        """
        recompute = self.num_recomputed if self.config.recompute == "full" else 0
        dropout = None if masks is None else masks.rows(1, masks.rng_states.shape[0])
        return run_blocks(
            self.blocks.values(),
            x,
            mask,
            recompute=recompute,
            rotary=rotary,
            dropout=dropout,
            partition=partition,
            caches=None if cache is None else cache.blocks(self.blocks.keys()),
        )
