"""GPT, whole or one pipeline stage of it."""

import torch
from torch import nn

from fused_megatron.checks import check
from fused_megatron.config import GPTConfig
from fused_megatron.deprecation import renamed_argument
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models.dropout import BatchSlice
from fused_megatron.models.key_value_cache import KeyValueCache
from fused_megatron.models.stack import HeadProduct, TransformerStack
from fused_megatron.models.stage_cut import StageSpan
from fused_megatron.modules.auxiliary_loss import WithAuxiliaryLoss, split_auxiliary_loss
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.sharding import SequenceLayout, SequencePartition


class GPT(TransformerStack):
    """Decoder-only transformer: learned or rotary positions, pre-norm blocks, tied or untied head.

    Every layout starts from the same full weights, drawn from `seed` and the parameters' names. A parameter of a stage
    has its name in the whole model. With tied embeddings the last stage holds a copy of token_embedding.weight. The
    caller sums the gradients of both copies and gives the sum to both stages.

    Args:
        config: sizes and options of the whole model; config.vocab_size must be given.
        layout: how the model is cut over R tensor-parallel ranks; None: not at all. Under sequence parallelism the
            activations between the tensor-parallel layers are sequence shards [S / R, B, H].
        seed: of the initial weights and of dropout.
        stage: the part of the model to build; None: all of it.
        dtype, device: of the parameters.

    Communication:
        Each block as TransformerBlock (with recompute="full" backward repeats its forward). One all-reduce for the
        embedding, one all-reduce backward for the head, and 12 bytes per token and rank for the loss.

    Memory:
        The loss keeps no logits: only one tile of them exists at a time.

    Paper: Shoeybi et al. 2019, Megatron-LM (arXiv:1909.08053); Korthikanti et al. 2022 for sequence parallelism
    (arXiv:2205.05198).
    """

    config: GPTConfig

    def __init__(
        self,
        config: GPTConfig,
        *,
        layout: ParallelLayout | None = None,
        seed: int = 0,
        stage: StageSpan | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            config, layout=layout, stage=stage, tied_head=config.tied_embeddings, dtype=dtype, device=device
        )
        # An untied head is sharded and padded like an embedding; only its forward differs.
        untied = self.span.last and not config.tied_embeddings
        self.head = self._vocabulary_table(dtype, device) if untied else None
        self.reset_parameters(seed)

    @renamed_argument(old="position", new="batch_slice")
    def forward(
        self,
        x: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        batch_slice: BatchSlice | None = None,
        sequence: SequenceLayout | None = None,
        partition: SequencePartition | None = None,
        documents: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        reduction: str = "none",
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor | WithAuxiliaryLoss:
        """Compute the loss or this rank's logits; in a pipeline stage, the input of the next stage.

        Args:
            x: [B, S] int64 tokens, S at most config.seq_len. Stages after the first: the output of the previous stage.
            target: [B, S] int64; None: return logits. Must be None in a stage: give it to the last stage's loss().
            batch_slice: the rows of the global batch in this microbatch; dropout in training mode needs it.
            sequence: positions of the S tokens (and targets) in a longer sequence; None: the S tokens are the whole
                sequence.
            partition: the positions of each context-parallel rank; the S tokens (and targets) are at this rank's
                positions. None: every rank has the whole sequence.
            documents: cumulative lengths, as in AttentionMask; None: every row is one document. Every stage needs it.
            positions: [B, S] int64 in [0, config.seq_len), the position of each token for the position embedding or
                rotation, such as its position in its document; None: its position in the sequence. It does not change
                which tokens see each other. Every stage needs it.
            reduction: "none", or "sum" of the losses; the gradients of the sum cost one product of the head less.
            cache: keys and values of the tokens before x, which also stores keys and values of x (cache.begin()
                announces their number); only in evaluation mode, without gradients. None: x has all tokens. Every stage
                needs it.

        Returns:
            A whole model with a target: the loss per token [B, S] float32 (0 where target is -100), or with "sum" a
            float64 scalar, the same on every rank. Without a target: logits_shard [B, S, V_padded / R]; with a cache,
            only of each row's last new token, [B, 1, V_padded / R].
            A stage: [S, B, H], or [S / R, B, H] under sequence parallelism. The last stage's output goes to loss() or
            logits().
            If a feed-forward has an auxiliary loss, the result carries the sum over the blocks.
        """
        mask = self.attention_mask(documents=documents)
        encoded = self._encode(
            x, mask, batch_slice=batch_slice, sequence=sequence, partition=partition, positions=positions, cache=cache
        )
        if cache is not None and self.stage is None:
            return self.next_logits(split_auxiliary_loss(encoded)[0], cache)
        return self._result(encoded, target, reduction)

    def attention_mask(
        self, *, key_padding_mask: torch.Tensor | None = None, documents: torch.Tensor | None = None
    ) -> AttentionMask:
        return AttentionMask(True, self.config.sliding_window, key_padding_mask, documents)

    def head_parameters(self) -> list[nn.Parameter]:
        head = self.token_embedding if self.head is None else self.head
        return [] if head is None else [head.weight]

    def _head(self, hidden: torch.Tensor) -> HeadProduct:
        head = self.token_embedding if self.head is None else self.head
        check(self.span.last and head is not None, "only the last stage has a head")
        assert head is not None
        return HeadProduct(hidden, head.weight, head.padded_num_embeddings, sequence_parallel=self.sequence_parallel)
