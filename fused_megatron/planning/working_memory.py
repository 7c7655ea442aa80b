"""Formulas for the most memory that the activations and temporary tensors of a stage take, for one microbatch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fused_megatron.config import TrainConfig
from fused_megatron.models import StageSpan
from fused_megatron.pipeline.schedule.action import Kind
from fused_megatron.planning.activation_memory import (
    deferred_by_experts,
    element_and_token_sizes,
    kept_by_block,
    kept_by_ends,
    loss_activations,
    mlp_elements,
)
from fused_megatron.planning.block_backward import (
    BackwardMoment,
    BlockMoment,
    block_backward,
    deferred_mlp,
    score_bytes,
)
from fused_megatron.planning.bucket_memory import BEGUN_TABLE, TABLE, Made
from fused_megatron.planning.parameter_counts import block_parameters, vocabulary_elements

# tile_bytes("cuda") of ops/linear_cross_entropy_tile_shape.py, which imports torch.
_TILE_BYTES = 256 << 20


@dataclass(frozen=True)
class StageBytes:
    """Bytes that one microbatch of a stage needs.

    Attributes:
        kept: bytes that a forward leaves for backward.
        deferred: bytes between INPUT_GRAD and WEIGHT_GRAD.
        forward, backward, input_grad, weight_grad: the most bytes at once inside an action of this kind, with what was
            kept or deferred before.
        make_moments: returns the moments of the backward, from the head to the embedding.
        forward_by_block: as forward, with the weights that are whole or arrive where ZeRO gathers them block by block.
    """

    kept: int
    deferred: int
    forward: int
    backward: int
    input_grad: int
    weight_grad: int
    make_moments: Callable[[], tuple[BackwardMoment, ...]]
    forward_by_block: int = 0

    @cached_property
    def moments(self) -> tuple[BackwardMoment, ...]:
        """The moments of the backward; a search needs them only of the layouts that it keeps."""
        return self.make_moments()

    def peak(self, kind: Kind) -> int:
        """Return the most bytes at once inside an action of this kind."""
        of_kind = {Kind.FORWARD: self.forward, Kind.INPUT_GRAD: self.input_grad, Kind.WEIGHT_GRAD: self.weight_grad}
        return of_kind.get(kind, self.backward)


class BlockBytes(NamedTuple):
    """Bytes of one microbatch in a block: kept for backward, added at the moments of its backward, and deferred.

    And its most bytes in a backward and in an INPUT_GRAD, and the number of its parameters.
    """

    kept: int
    backward: list[BlockMoment]
    most: int
    most_put_off: int
    deferred: int
    parameters: int


KnownBlocks = dict[tuple[bool, bool], BlockBytes]
"""Bytes of the blocks of one config, by (whether it is recomputed, whether it has experts)."""


def stage_bytes(config: TrainConfig, span: StageSpan, known: KnownBlocks | None = None) -> StageBytes:
    """Compute the bytes that one microbatch of a stage needs.

    Args:
        config: the config of the whole run.
        span: the blocks of the stage.
        known: what other stages of this config have computed; this one's blocks are added.
    """
    model, of_kind = config.model, {} if known is None else known
    size, _, own = element_and_token_sizes(config)
    residual = size * own * model.hidden_size
    blocks = [model.has_experts(block) for block in range(span.start, span.stop)]
    again = model.recomputed_blocks(len(blocks))
    kinds = [(index < again, has_experts) for index, has_experts in enumerate(blocks)]
    for kind in set(kinds) - of_kind.keys():
        of_backward = block_backward(config, kind[1], kind[0] and model.recompute == "full")
        of_kind[kind] = BlockBytes(
            kept_by_block(config, *kind),
            of_backward,
            most=max(moment.num_bytes for moment in of_backward),
            most_put_off=max(moment.num_bytes + moment.put_off for moment in of_backward),
            deferred=block_deferred(config, kind[1]),
            parameters=block_parameters(model, config.parallel, kind[1]).total,
        )
    kept = sum(of_kind[kind].kept for kind in kinds) + kept_by_ends(config, span)
    # Before the backward of the last block, the loss's tensors and the final norm have gone.
    of_blocks = before = kept - (loss_activations(config) if span.last else 0)
    units = [of_kind[kind].parameters for kind in kinds]
    head = _head_moments(config, span, kept, before, units[-1] if units else 0)
    input_grad = backward = max(moment.num_bytes for moment in head)
    deferred = 0  # of the blocks whose INPUT_GRAD is through
    for kind in reversed(kinds):
        block = of_kind[kind]
        backward = max(backward, before + block.most)
        input_grad = max(input_grad, before + deferred + block.most_put_off)
        before -= block.kept
        deferred += block.deferred
    embedding = _embedding_moments(config, span, before, units[0] if units else 0)
    backward = max(backward, *(moment.num_bytes for moment in embedding))
    deferred += before + (0 if span.first else 2 * residual)  # the stage's input, and its gradient
    in_blocks = of_blocks + residual
    if blocks and (scores := score_bytes(config)):
        in_blocks = max(in_blocks, of_blocks + _scores_in_forward(config, scores))
    in_head = kept + (head_working(config) if span.last else 2 * residual)  # the result, and the copy that is sent
    return StageBytes(
        kept,
        deferred,
        forward=max(in_blocks, in_head),
        backward=backward,
        input_grad=max(input_grad, deferred),
        weight_grad=deferred,
        make_moments=lambda: (*head, *_moments_of_blocks([of_kind[kind] for kind in kinds], of_blocks), *embedding),
        forward_by_block=_with_units(config, span, in_blocks, in_head, units),
    )


def _moments_of_blocks(blocks: Sequence[BlockBytes], before: int) -> list[BackwardMoment]:
    """Return the moments of the backward of all blocks of a stage, the last one first."""
    moments: list[BackwardMoment] = []
    for index, block in reversed(list(enumerate(blocks))):
        gathered = block.parameters + (blocks[index - 1].parameters if index else 0)  # the block before arrives
        moments += [BackwardMoment(before + num_bytes, made, gathered) for num_bytes, made, _ in block.backward]
        before -= block.kept
    return moments


def _with_units(config: TrainConfig, span: StageSpan, in_blocks: int, in_head: int, units: Sequence[int]) -> int:
    """Return the most bytes of a forward with the weights that ZeRO has gathered: of a block and of the next unit."""
    table = vocabulary_elements(config.model, config.parallel.tensor_parallel_size) if span.last else 0
    in_last = (units[-1] if units else 0) + table
    before_last = sum(units[-2:]) if len(units) > 1 else 0
    size, kept = config.training.element_bytes, kept_by_block(config, False, config.model.has_experts(span.stop - 1))
    return max(in_blocks + size * in_last, in_blocks - kept + size * before_last, in_head + size * table)


def _head_moments(
    config: TrainConfig, span: StageSpan, kept: int, before: int, last_block: int
) -> list[BackwardMoment]:
    """Return the moments of a backward before its blocks: of the head and the final norm."""
    model = config.model
    size, _, own = element_and_token_sizes(config)
    residual = size * own * model.hidden_size
    if not span.last:
        return [BackwardMoment(before + residual)]
    table = vocabulary_elements(model, config.parallel.tensor_parallel_size)
    kind = BEGUN_TABLE if span.first and model.tied_embeddings else TABLE
    norm = model.hidden_size * (1 if model.normalization == "rms_norm" else 2)
    gradient = 4 * own * model.hidden_size
    return [
        BackwardMoment(kept, Made(table, kind), gathered=table),
        BackwardMoment(before + 2 * residual + gradient, Made(norm), gathered=last_block),
    ]


def _embedding_moments(config: TrainConfig, span: StageSpan, before: int, first_block: int) -> list[BackwardMoment]:
    """Return the moments of a backward after its blocks: of the embedding, and of the stage's input.

    The weights of the first block stay whole to the end of the backward.
    """
    model, parallel = config.model, config.parallel
    size, tokens, own = element_and_token_sizes(config)
    residual = size * own * model.hidden_size
    if not span.first:
        return [BackwardMoment(before + 2 * residual, gathered=first_block)]
    positions = (model.position == "learned") * model.seq_len * model.hidden_size
    table = vocabulary_elements(model, parallel.tensor_parallel_size)
    gathered = (size * tokens * model.hidden_size) * (2 if parallel.sequence_parallel else 1)
    return [
        BackwardMoment(before + residual + gathered, Made(positions), first_block),
        BackwardMoment(before + residual + gathered, Made(table, TABLE), first_block),
        BackwardMoment(before, gathered=first_block),
    ]


def head_working(config: TrainConfig) -> int:
    """Compute the bytes of the loss beyond what it keeps: tiles of logits, and partial sums of the gradient of hidden.

    A tile has all tokens if it is small enough. Otherwise ranks that exchange statistics have two tiles of half the
    size. Sequence parallelism gathers hidden; the partial sums arrive whole for a shard.
    """
    model, ranks = config.model, config.parallel.tensor_parallel_size
    size, tokens, _ = element_and_token_sizes(config)
    row_bytes = size * vocabulary_elements(model, ranks) // model.hidden_size
    if tokens * row_bytes <= _TILE_BYTES:
        chunk, logits = tokens, tokens * row_bytes
    else:
        chunk = max(1, _TILE_BYTES // row_bytes // min(ranks, 2))
        logits = min(ranks, 2) * chunk * row_bytes
    if ranks == 1:
        return logits
    hidden = size * chunk * model.hidden_size
    return logits + (3 * hidden + hidden // ranks if config.parallel.sequence_parallel else hidden)


def block_deferred(config: TrainConfig, has_experts: bool) -> int:
    """Compute the bytes of a block between INPUT_GRAD and WEIGHT_GRAD: operands of products and their gradients.

    With sequence parallelism the gathered input of attention stays beside the shard; gradients of outputs are whole.
    """
    model, ranks = config.model, config.parallel.tensor_parallel_size
    size, tokens, own = element_and_token_sizes(config)
    query = model.num_heads // ranks * model.head_size
    keys = 2 * max(1, model.kv_heads // ranks) * model.head_size
    shard = own if config.parallel.sequence_parallel else 0
    attention = size * ((2 * tokens + shard) * model.hidden_size + tokens * (2 * query + keys))
    if has_experts:
        return attention + deferred_by_experts(config)
    return attention + deferred_mlp(config)


def _scores_in_forward(config: TrainConfig, scores: int) -> int:
    """Compute what the attention of a stage's last block has in forward beyond all that the stage's blocks keep.

    The MLP of the block keeps nothing yet. Where whole blocks are recomputed, no block keeps scores or an MLP.
    """
    model = config.model
    size, tokens, own = element_and_token_sizes(config)
    ranks = config.parallel.tensor_parallel_size
    query = size * tokens * (model.num_heads // ranks) * model.head_size
    key = size * tokens * max(1, model.kv_heads // ranks) * model.head_size
    working = query + 3 * key
    if model.recompute == "full":
        return 4 * scores + working
    later = 2 * own * model.hidden_size + mlp_elements(config, model.ffn_size)  # and the attention's result
    return (4 if model.recompute == "selective" else 2) * scores + working - size * later - query
