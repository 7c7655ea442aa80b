"""CUDA graphs of transformer blocks: forward and backward of a block are two launches of the host."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import check
from fused_megatron.collectives import group_size
from fused_megatron.models.attention import Tables
from fused_megatron.models.block import TransformerBlock
from fused_megatron.models.residual_stream import OpenSum, closed
from fused_megatron.models.stack import TransformerStack
from fused_megatron.modules.auxiliary_loss import WithAuxiliaryLoss
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.sharding import SequenceLayout

Capture = Callable[..., tuple[nn.Module, ...]]
"""torch.cuda.make_graphed_callables, or a function that does the same on another device."""


def capture_blocks(stack: TransformerStack, microbatch_size: int, capture: Capture | None = None) -> None:
    """Capture every block of a model, and let the forward of a block in training replay its graphs.

    A replay runs the kernels that the capture recorded, on the same addresses and with the same numbers. So a block
    must do the same for every microbatch, and the backward of a microbatch must end before the next microbatch begins.
    TrainConfig refuses what does not keep this, and a call with other arguments raises. Backward adds weight gradients
    to the same main_grad as without graphs. In evaluation, and without gradients, blocks run as before.

    All tensor-parallel ranks must call this together, after the gradients have their memory (GradientBuckets) and
    before the weights are used. It leaves numbers in the gradients: set them to 0 before the first backward, as each
    training step does.

    Args:
        stack: a whole model; its parameters are on a GPU.
        microbatch_size: B of every microbatch.
        capture: makes the graphs; None: torch.cuda.make_graphed_callables.

    Raises:
        InputError: the model is not on a GPU, or its blocks drop elements.

    Communication: as four forwards and backwards of all blocks.
    Memory: a private pool of the allocator, which keeps the activations of all blocks from one step to the next, and
        the input and the gradient of the output of each block.
    """
    config, weight = stack.config, next(stack.parameters())
    check(
        config.hidden_dropout == config.attention_dropout == 0,
        f"hidden_dropout={config.hidden_dropout} and attention_dropout={config.attention_dropout} must be 0: a graph "
        "would drop the same elements each time",
    )
    if capture is None:
        check_graph_device(weight.device)
    make_graphs: Any = capture or torch.cuda.make_graphed_callables
    rows = config.seq_len // (group_size(stack.tp_group) if stack.sequence_parallel else 1)
    shape = (rows, microbatch_size, config.hidden_size)
    # The tables of all microbatches are the same: the graphs keep and read these.
    tables = stack._rotary(SequenceLayout.whole(config.seq_len), weight)
    mask = stack.attention_mask()
    blocks = [block for block in stack.blocks.values() if isinstance(block, TransformerBlock)]
    assert all(block.training for block in blocks)
    plain = tuple(_BlockOfTensors(block, mask, tables) for block in blocks)
    samples = [torch.zeros(shape, dtype=weight.dtype, device=weight.device, requires_grad=True) for _ in plain]
    # allow_unused_input: linear layers add their weight gradients to main_grad, and return none.
    graphed = make_graphs(plain, tuple((x,) for x in samples), allow_unused_input=True)
    for block, before, after in zip(blocks, plain, graphed, strict=True):
        block.forward = _Replay(block, before, after, shape)  # type: ignore[method-assign]


def check_graph_device(device: torch.device) -> None:
    """Raise InputError unless the device has CUDA graphs."""
    check(
        device.type == "cuda",
        f"training.cuda_graphs='block' needs a GPU, and this run is on {device.type} (training.cuda_graphs='off')",
    )


class _BlockOfTensors(nn.Module):
    """A block as a function of one tensor, as make_graphed_callables takes it."""

    def __init__(self, block: TransformerBlock, mask: AttentionMask, tables: Tables | None) -> None:
        super().__init__()
        self.block, self.mask, self.tables = block, mask, tables
        self.plain_forward = block.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Not block(x): the hooks of a block run before and after each replay.
        y = self.plain_forward(x, self.mask, rotary=self.tables)
        assert isinstance(y, torch.Tensor)
        return y


class _Replay:
    """The forward of a block whose graphs are captured."""

    def __init__(self, block: nn.Module, plain: _BlockOfTensors, graphed: nn.Module, shape: tuple[int, ...]) -> None:
        self._block, self._plain, self._graphed, self._shape = block, plain, graphed, shape

    def __call__(
        self,
        x: torch.Tensor | OpenSum,
        mask: AttentionMask,
        *,
        rotary: Tables | None = None,
        dropout: Any = None,
        may_leave_open: bool = False,
        **options: Any,
    ) -> torch.Tensor | OpenSum | WithAuxiliaryLoss:
        """As TransformerBlock.forward; a graph takes and returns closed sums."""
        if not (self._block.training and torch.is_grad_enabled()):
            return self._plain.plain_forward(
                x, mask, rotary=rotary, dropout=dropout, may_leave_open=may_leave_open, **options
            )
        x = closed(x)
        # `dropout` has no effect: the masks of a model that drops only after its embedding.
        captured = self._plain
        found = {"x.shape": tuple(x.shape), "mask": mask, "rotary": _shape_of(rotary), **options}
        wanted = {"x.shape": self._shape, "mask": captured.mask, "rotary": _shape_of(captured.tables)}
        for name, value in found.items():
            check(
                value == wanted.get(name),
                f"{name}={value} must be {wanted.get(name)}, as in the captured graph (training.cuda_graphs='off')",
            )
        y: torch.Tensor = self._graphed(x)
        return y


def _shape_of(tables: Tables | None) -> tuple[int, ...] | None:
    return None if tables is None else tuple(tables[0].shape)
