"""Formulas for the most memory that the activations and temporary tensors of a stage take, for one microbatch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fused_megatron.config import TrainConfig, TransformerConfig
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


BlockKind = tuple[bool, bool]
"""Kind of a block: whether it is recomputed, and whether it has experts."""


class BlocksOfConfig:
    """Bytes of the blocks of one config, by their kind, and of stages of such blocks.

    Args:
        config: the config of a run; how many blocks it recomputes does not matter.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._known: dict[BlockKind, BlockBytes] = {}
        size, tokens, own = element_and_token_sizes(config)
        self._residual = size * own * config.model.hidden_size
        self._loss = loss_activations(config)
        self._of_first = kept_by_ends(config, StageSpan(0, 2, 0, 0))
        self._gradient = 4 * own * config.model.hidden_size  # of hidden, in float32
        gathered = size * tokens * config.model.hidden_size
        self._of_embedding = self._residual + gathered * (2 if config.parallel.sequence_parallel else 1)

    def block(self, kind: BlockKind) -> BlockBytes:
        """Return the bytes of a block."""
        if kind not in self._known:
            config, (recomputed, has_experts) = self._config, kind
            of_backward = block_backward(config, has_experts, recomputed and config.model.recompute == "full")
            self._known[kind] = BlockBytes(
                kept_by_block(config, recomputed, has_experts),
                of_backward,
                most=max(moment.num_bytes for moment in of_backward),
                most_put_off=max(moment.num_bytes + moment.put_off for moment in of_backward),
                deferred=block_deferred(config, has_experts),
                parameters=block_parameters(config.model, config.parallel, has_experts).total,
            )
        return self._known[kind]

    def kept_and_backward(self, runs: Sequence[tuple[BlockKind, int]], first: bool, last: bool) -> tuple[int, int]:
        """Return `kept` and `backward` of stage_bytes alone: a search asks often.

        Args:
            runs: kinds of the stage's blocks in their order, each with the number of blocks in a row.
            first, last: whether the stage has the embedding, and the head.
        """
        blocks = [(self.block(kind), number) for kind, number in runs]
        # Before the backward of the last block, the loss's tensors and the final norm have gone.
        before = sum(block.kept * number for block, number in blocks) + (self._of_first if first else 0)
        kept = before + (self._loss if last else 0)
        most = max(kept, before + 2 * self._residual + self._gradient) if last else before + self._residual
        for block, number in reversed(blocks):
            most = max(most, before + block.most)  # later blocks of the run find less
            before -= block.kept * number
        return kept, max(most, before + (self._of_embedding if first else 2 * self._residual))


def kinds_of_blocks(model: TransformerConfig, has_experts: Sequence[bool]) -> list[BlockKind]:
    """Return the kinds of a stage's blocks.

    Args:
        model: of the run.
        has_experts: for each block of the stage, whether it has experts.
    """
    again = model.recomputed_blocks(len(has_experts))
    return [(index < again, experts) for index, experts in enumerate(has_experts)]


def stage_bytes(config: TrainConfig, span: StageSpan) -> StageBytes:
    """Compute the bytes that one microbatch of a stage needs.

    Args:
        config: the config of the whole run.
        span: the blocks of the stage.
    """
    model, known = config.model, BlocksOfConfig(config)
    size, _, own = element_and_token_sizes(config)
    residual = size * own * model.hidden_size
    kinds = kinds_of_blocks(model, [model.has_experts(block) for block in range(span.start, span.stop)])
    blocks = [known.block(kind) for kind in kinds]
    kept, backward = known.kept_and_backward([(kind, 1) for kind in kinds], span.first, span.last)
    of_blocks = before = kept - (loss_activations(config) if span.last else 0)
    units = [block.parameters for block in blocks]
    head = _head_moments(config, span, kept, before, units[-1] if units else 0)
    input_grad = max(moment.num_bytes for moment in head)
    deferred = 0  # of the blocks whose INPUT_GRAD is through
    for block in reversed(blocks):
        input_grad = max(input_grad, before + deferred + block.most_put_off)
        before -= block.kept
        deferred += block.deferred
    embedding = _embedding_moments(config, span, before, units[0] if units else 0)
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
        make_moments=lambda: (*head, *_moments_of_blocks(blocks, of_blocks), *embedding),
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
