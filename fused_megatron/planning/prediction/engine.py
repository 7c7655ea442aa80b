"""Engines: stated facts about the software that runs a training step, so that published runs can be compared."""

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
        parallel_ops: ops that tensor parallelism adds to a block, forward or backward.
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
    parallel_ops: int = 10
    overlaps_products: bool = False
    overlaps_gradients: bool = True
    gradient_bytes: int = 4
    update_bytes: int = 40
    activation_passes: float = 12.0


OWN = "fused-megatron"
ENGINES = {
    OWN: Engine(forward_ops=25, backward_ops=45, overlaps_products=True),
    "megatron-core": Engine(overlaps_gradients=False),
    "megatron-deepspeed": Engine(
        fused_attention=False,
        score_passes=4.5,
        overlaps_gradients=False,
        gradient_bytes=2,
        activation_passes=16.0,
    ),
    "megatron-lm": Engine(fused_attention=False, score_passes=4.5, overlaps_gradients=False, activation_passes=16.0),
    "llm-foundry": Engine(gradient_bytes=2, update_bytes=40),
}
"""Engines by name. megatron-lm is the program of the papers of 2021 and 2022; megatron-deepspeed has fp16 gradients."""


def engine_of(name: str) -> Engine:
    """Return the engine with this name; raise InputError for an unknown one."""
    check_one_of("engine", name, list(ENGINES))
    return ENGINES[name]
