"""Engines: stated facts about the software that runs a training step, so that published runs can be compared.

Numbers of ops and of passes over memory of other programs are not published. They were found together with the
constants of a cluster, from the rows that its file names, and then rounded (megatron-lm has the passes of
megatron-deepspeed).
"""

from dataclasses import dataclass

from fused_megatron.checks import check_one_of


@dataclass(frozen=True)
class Engine:
    """Facts about a training program that decide what a step computes and sends.

    Attributes:
        fused_attention: attention runs in one kernel that skips masked blocks and keeps no scores. Otherwise scores of
            all pairs pass through memory.
        score_passes: number of times that the scores [B, N, S, S] are read or written in forward besides the products,
            without a fused kernel: scaling, mask and softmax in one kernel (2), dropout (2.5 with its mask).
        forward_ops, backward_ops: ops that the host launches for a block without tensor parallelism.
        parallel_ops: ops that the host loses with R tensor-parallel ranks in a block's forward or backward, for each of
            (R - 1)^2: a collective waits for the slowest host.
        softmax_multiple: the fused softmax kernel needs a number of matrices (samples x heads of a rank) that this
            divides; otherwise softmax takes separate_softmax_ops more ops in forward, and twice as many in backward.
        logit_passes: number of times that the logits are read or written, forward and backward together, besides the
            products: an unfused loss works on float32 copies of them, which count twice.
        expert_ops: ops for each local expert of a block in forward, and twice as many in backward, if experts run one
            after the other; as many again where tensor-parallel ranks share each expert.
        embedding_ops, head_ops: ops of the embedding, and of the last norm, the head and the loss, forward or backward.
        shard_ops: ops that tensor parallelism adds to a block's forward, and to its backward.
        sequence_ops: the same with sequence parallelism.
        context_ops: ops that context parallelism adds to a block's forward for each rank of a ring, or twice, and 1.3
            times as many in backward.
        unshard_ops: ops that sharded weights (ZeRO stage 3) add to a block's forward, and twice as many in backward;
            and for each gather of an end of the model.
        state_ops: ops of a step for each block whose optimizer state replicas share.
        message_ops: ops that a message between two stages is worth.
        host_message_ops: ops that either end of a message takes on a CPU, in its threads of gloo, too.
        sums_tied_tables: the gradients of a table that the first and the last stage hold are summed once a step.
            Otherwise the constants count what this takes.
        loss_gradients_first: the head computes its gradients in forward, from the logits that it has.
        scatters_messages: obeys parallel.scatter_messages. Otherwise a tensor-parallel rank sends whole messages, or
            the constants count what it sends.
        overlaps_products: collectives of tensor parallelism run beside products.
        overlaps_gradients: gradients are reduced under the last backward.
        gradient_bytes: bytes an element of a reduced gradient.
        update_bytes: bytes read and written for an element in the update: gradient, moments, weights, clipping.
        activation_passes: bytes read and written for an element of [S, B, H] in a block's forward besides products:
            norms, residual additions, copies between layouts; in elements.
    """

    fused_attention: bool = True
    score_passes: float = 0.0
    forward_ops: int = 40
    backward_ops: int = 80
    parallel_ops: float = 0.29
    softmax_multiple: int = 1
    separate_softmax_ops: int = 0
    logit_passes: float = 12.0
    expert_ops: float = 0.0
    embedding_ops: int = 4
    head_ops: int = 10
    shard_ops: float = 0.0
    sequence_ops: float = 0.0
    context_ops: float = 0.0
    unshard_ops: float = 0.0
    state_ops: float = 0.0
    message_ops: float = 0.0
    host_message_ops: float = 0.0
    sums_tied_tables: bool = False
    loss_gradients_first: bool = False
    scatters_messages: bool = False
    overlaps_products: bool = False
    overlaps_gradients: bool = True
    gradient_bytes: int = 4
    update_bytes: int = 40
    activation_passes: float = 10.0


OWN = "fused-megatron"
ENGINES = {
    # Time of a rank's host on two ranks of a CPU, in models too small for anything else, in units of 1/72 of a block.
    OWN: Engine(
        forward_ops=38,
        backward_ops=34,
        embedding_ops=15,
        head_ops=27,
        shard_ops=6,
        sequence_ops=34,
        context_ops=20,
        unshard_ops=22,
        state_ops=36,
        logit_passes=4,
        host_message_ops=20,
        sums_tied_tables=True,
        loss_gradients_first=True,
        scatters_messages=True,
        overlaps_products=True,
    ),
    "megatron-core": Engine(
        forward_ops=120,
        backward_ops=240,
        expert_ops=6,
        logit_passes=60,
        activation_passes=8.0,
        overlaps_gradients=False,
    ),
    "megatron-deepspeed": Engine(
        fused_attention=False,
        score_passes=4.5,
        forward_ops=70,
        backward_ops=130,
        softmax_multiple=4,
        separate_softmax_ops=20,
        logit_passes=16,
        message_ops=72,
        overlaps_gradients=False,
        gradient_bytes=2,
        update_bytes=30,  # float32 weights and moments read and written; gradient read for the norm, too
        activation_passes=12.0,
    ),
    "megatron-lm": Engine(
        fused_attention=False,
        score_passes=4.5,
        logit_passes=30,
        scatters_messages=True,  # Narayanan et al. 2021 (arXiv:2104.04473), section 4.1
        overlaps_gradients=False,
        activation_passes=12.0,
    ),
    "llm-foundry": Engine(logit_passes=30, gradient_bytes=2, update_bytes=40, activation_passes=44.0),
}
"""Engines by name. megatron-lm is the program of the papers of 2021 and 2022; megatron-deepspeed has fp16 gradients."""


def engine_of(name: str) -> Engine:
    """Return the engine with this name; raise InputError for an unknown one."""
    check_one_of("engine", name, list(ENGINES))
    return ENGINES[name]
