"""BERT, whole or one pipeline stage of it: encoder, masked-LM head and next-sentence head."""

from dataclasses import replace

import torch
from torch import nn

from fused_megatron import ops
from fused_megatron.checks import check
from fused_megatron.collectives import all_gather_split, group_rank
from fused_megatron.config import BERTConfig
from fused_megatron.deprecation import renamed_argument
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models.block import norm_of
from fused_megatron.models.dropout import BatchSlice
from fused_megatron.models.stack import HeadProduct, TransformerStack
from fused_megatron.models.stage_cut import StageSpan
from fused_megatron.modules.auxiliary_loss import WithAuxiliaryLoss
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.sharding import ParameterShard, SequenceLayout, SequencePartition
from fused_megatron.tensor_parallel import ColumnParallelLinear, SequenceParallelLayerNorm, SequenceParallelRMSNorm


class BERT(TransformerStack):
    """Bidirectional encoder with a masked-LM head: norm(gelu(linear(x))) token_embedding.weight^T + head_bias.

    Every layout starts from the same full weights, drawn from `seed` and the parameters' names. A parameter of a stage
    has its name in the whole model. The last stage holds a copy of token_embedding.weight for its head. The caller sums
    the gradients of both copies and gives the sum to both stages.

    Args:
        config: sizes and options of the whole model; config.vocab_size must be given.
        layout: how the model is cut over R tensor-parallel ranks; None: not at all. Under sequence parallelism the
            activations between the tensor-parallel layers are sequence shards [S / R, B, H].
        seed: of the initial weights and of dropout.
        stage: the part of the model to build; None: all of it.
        dtype, device: of the parameters.

    Communication:
        Each block as TransformerBlock (with recompute="full" backward repeats its forward). One all-reduce for the
        embedding. For the head one all-gather of S B H elements forward, one all-reduce for each of its two products
        backward, and 12 bytes per token and rank for the loss.

    Memory:
        The loss keeps no logits: only one tile of them exists at a time. Every rank holds the whole input of the head.

    Paper: Devlin et al. 2018 (arXiv:1810.04805); the order of norms: Shoeybi et al. 2019, section 3 (arXiv:1909.08053).
    """

    config: BERTConfig
    head_transform: ColumnParallelLinear | None
    head_norm: SequenceParallelLayerNorm | SequenceParallelRMSNorm | None
    pooler: ColumnParallelLinear | None
    next_sentence: ColumnParallelLinear | None

    def __init__(
        self,
        config: BERTConfig,
        *,
        layout: ParallelLayout | None = None,
        seed: int = 0,
        stage: StageSpan | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            config,
            layout=layout,
            stage=stage,
            tied_head=config.masked_lm_head,
            num_token_types=config.num_token_types,
            post_norm=config.post_norm,
            dtype=dtype,
            device=device,
        )
        self.head_transform = self.head_norm = self.pooler = self.next_sentence = None
        if config.masked_lm_head and self.span.last:
            self._add_masked_lm_head(dtype, device)
        if config.next_sentence_head and self.span.last:
            self._add_next_sentence_head(dtype, device)
        self.reset_parameters(seed)

    def _add_masked_lm_head(self, dtype: torch.dtype | None, device: torch.device | None) -> None:
        self.head_transform = self._dense(self.layout, dtype, device)
        # The head norm's input is whole and the same on every rank, and so are its gradients.
        whole = replace(self.layout, sequence_parallel=False)
        self.head_norm = norm_of(self.config, layout=whole, dtype=dtype, device=device)
        assert self.token_embedding is not None
        weight = self.token_embedding.weight
        bias = nn.Parameter(torch.empty_like(weight[:, 0]))
        offset = group_rank(self.tp_group) * weight.shape[0]
        self.register_shard("head_bias", bias, ParameterShard((self.vocab_size,), (offset,)))

    def _add_next_sentence_head(self, dtype: torch.dtype | None, device: torch.device | None) -> None:
        self.pooler = self._dense(replace(self.layout, sequence_parallel=False), dtype, device)
        # Two output features are too few to shard.
        self.next_sentence = ColumnParallelLinear(
            self.config.hidden_size,
            2,
            init_std=self.config.init_std,
            tp_group=None,
            overlap=self.layout.overlap,
            dtype=dtype,
            device=device,
        )

    def _dense(
        self, layout: ParallelLayout, dtype: torch.dtype | None, device: torch.device | None
    ) -> ColumnParallelLinear:
        """Return a linear layer from H to H features whose output is whole on every rank."""
        return ColumnParallelLinear(
            self.config.hidden_size,
            self.config.hidden_size,
            init_std=self.config.init_std,
            gather_output=True,
            tp_group=layout.tp_group,
            sequence_parallel=layout.sequence_parallel,
            overlap=layout.overlap,
            dtype=dtype,
            device=device,
        )

    @renamed_argument(old="position", new="batch_slice")
    @renamed_argument(old="is_padding", new="key_padding_mask")
    def forward(
        self,
        x: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        token_types: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        batch_slice: BatchSlice | None = None,
        sequence: SequenceLayout | None = None,
        partition: SequencePartition | None = None,
        reduction: str = "none",
    ) -> torch.Tensor | WithAuxiliaryLoss:
        """Compute the masked-LM loss or this rank's logits; in a pipeline stage, the input of the next stage.

        Args:
            x: as in encode(): [B, S] int64 tokens, some of them masked, or the output of the previous stage.
            target: [B, S] int64, the original tokens at masked positions, -100 elsewhere. None: return logits. Must be
                None in a stage: give it to the last stage's loss().
            token_types, key_padding_mask, batch_slice, sequence, partition: as in encode().
            reduction: "none", or "sum" of the losses; the gradients of the sum cost one product of the head less.

        Returns:
            A whole model with a target: the loss per token [B, S] float32 (0 where target is -100), or with "sum" a
            float64 scalar, the same on every rank. Without a target: logits_shard [B, S, V_padded / R].
            A stage: as encode(). The last stage's output goes to loss() or logits().
            If a feed-forward has an auxiliary loss, the result carries the sum over the blocks.
        """
        check(
            self.config.masked_lm_head or self.stage is not None,
            "masked_lm_head=False: this model has no masked-LM head (use encode)",
        )
        encoded = self.encode(
            x,
            token_types=token_types,
            key_padding_mask=key_padding_mask,
            batch_slice=batch_slice,
            sequence=sequence,
            partition=partition,
        )
        return self._result(encoded, target, reduction)

    @renamed_argument(old="position", new="batch_slice")
    @renamed_argument(old="is_padding", new="key_padding_mask")
    def encode(
        self,
        x: torch.Tensor,
        *,
        token_types: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        batch_slice: BatchSlice | None = None,
        sequence: SequenceLayout | None = None,
        partition: SequencePartition | None = None,
    ) -> torch.Tensor | WithAuxiliaryLoss:
        """Compute the input of the heads or of the next stage: [S, B, H], or [S / R, B, H] under sequence parallelism.

        Args:
            x: [B, S] int64 tokens, S at most config.seq_len. Stages after the first: the output of the previous stage.
            token_types: [B, S] int64 below config.num_token_types; None: all 0. Only the first stage reads them.
            key_padding_mask: [B, S] bool, as in torch: True for a token that no token attends to. Each row has at least
                one False. Every stage needs it.
            batch_slice: the rows of the global batch in this microbatch; dropout in training mode needs it.
            sequence: positions of the S tokens in a longer sequence; None: the S tokens are the whole sequence.
            partition: the positions of each context-parallel rank; the S tokens, their types and padding are at this
                rank's positions. None: every rank has the whole sequence.
        """
        mask = self.attention_mask(key_padding_mask=key_padding_mask)
        return self._encode(
            x, mask, token_types=token_types, batch_slice=batch_slice, sequence=sequence, partition=partition
        )

    def attention_mask(
        self, *, key_padding_mask: torch.Tensor | None = None, documents: torch.Tensor | None = None
    ) -> AttentionMask:
        return AttentionMask(key_padding_mask=key_padding_mask, documents=documents)

    def next_sentence_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits [B, 2], the same on every rank: (the second sentence follows, it does not).

        Args:
            hidden: the output of encode() of whole sequences (partition=None).

        Communication: under sequence parallelism one all-gather of hidden.
        """
        check(self.pooler is not None, "next_sentence_head=False: this model has no next-sentence head")
        assert self.pooler is not None and self.next_sentence is not None
        whole = all_gather_split(hidden, 0, self.tp_group) if self.sequence_parallel else hidden
        logits = self.next_sentence(torch.tanh(self.pooler(whole[0])))
        assert isinstance(logits, torch.Tensor)
        return logits

    def head_parameters(self) -> list[nn.Parameter]:
        if self.head_transform is None or self.token_embedding is None:
            return []
        return [self.token_embedding.weight, self.get_parameter("head_bias")]

    def _head(self, hidden: torch.Tensor) -> HeadProduct:
        check(self.head_transform is not None, "the masked-LM head belongs to the last stage of a model that has one")
        assert self.head_transform is not None and self.head_norm is not None and self.token_embedding is not None
        approximate = "none" if self.config.activation == "gelu_exact" else "tanh"
        transformed = self.head_transform(hidden)
        assert isinstance(transformed, torch.Tensor)
        x = self.head_norm(ops.bias_gelu(transformed, None, approximate))
        table = self.token_embedding
        return HeadProduct(x, table.weight, table.padded_num_embeddings, self.get_parameter("head_bias"))
