"""Update rules of elementwise optimizers: AdamW, SGD with momentum, Lion."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from fused_megatron import ops
from fused_megatron.checks import has_values
from fused_megatron.config import OptimizerConfig

_PIECE_ELEMENTS = 1 << 15
"""Four tensors of this size and two temporaries fit into the second-level cache of a core."""


@dataclass(frozen=True)
class ParameterGroup:
    """Tensors of parameters that are updated together; every list has one entry for each name, in its shape.

    Attributes:
        names: names of the parameters.
        main: float32 weights.
        gradient: float32 gradients.
        state: float32 state by its name in torch's optimizers, such as "exp_avg".
        low: parameters in lower precision that the main weights are rounded into; empty if there are none.
        weight_decay: weight decay of all these parameters.
    """

    names: Sequence[str]
    main: list[torch.Tensor]
    gradient: list[torch.Tensor]
    state: Mapping[str, list[torch.Tensor]]
    low: list[torch.Tensor]
    weight_decay: float


class UpdateStep(NamedTuple):
    """One update of all parameters.

    Attributes:
        number: number of this update, from 1 on.
        lr: learning rate.
        gradient_scale: factor of the gradients: a number, or a float32 tensor of one element on their device.
        refused: bool tensor of one element on the device; if it is True, nothing changes. None: it is False.
        zeroes_gradients: whether the gradients become 0 in the same pass.
    """

    number: int
    lr: float
    gradient_scale: float | torch.Tensor
    refused: torch.Tensor | None = None
    zeroes_gradients: bool = False


class UpdateRule(Protocol):
    """Computation of new weights and state from gradients.

    Attributes:
        state_names: names of the float32 state tensors that each parameter has, in its shape.
        elementwise: whether the update of an element depends only on this element, so that a group may be cut.
        refuses_on_device: whether the rule reads UpdateStep.refused and zeroes_gradients, which otherwise must be None
            and False.
    """

    state_names: tuple[str, ...]
    elementwise: bool
    refuses_on_device: bool

    def update(self, group: ParameterGroup, step: UpdateStep) -> None:
        """Update weights and state of a group in place."""


class AdamW:
    """torch.optim.AdamW, by ops.adamw_."""

    state_names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    elementwise = True
    refuses_on_device = True

    def __init__(self, config: OptimizerConfig) -> None:
        self._config = config

    def update(self, group: ParameterGroup, step: UpdateStep) -> None:
        """As UpdateRule.update."""
        config = self._config
        ops.adamw_(
            group.main,
            group.state["exp_avg"],
            group.state["exp_avg_sq"],
            group.gradient,
            low=group.low,
            step=step.number,
            lr=step.lr,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            weight_decay=group.weight_decay,
            gradient_scale=step.gradient_scale,
            skip=step.refused,
            zero_gradient=step.zeroes_gradients,
        )


class SGD:
    """torch.optim.SGD with momentum; as in torch, the weight decay is added to the gradient.

    Without momentum there is no state.
    """

    elementwise = True
    refuses_on_device = False

    def __init__(self, config: OptimizerConfig) -> None:
        self._momentum, self._nesterov = config.momentum_used, config.nesterov_used
        self.state_names: tuple[str, ...] = ("momentum_buffer",) if self._momentum else ()

    def update(self, group: ParameterGroup, step: UpdateStep) -> None:
        """As UpdateRule.update."""
        for piece in _pieces(group):
            self._update(piece, step.lr, step.gradient_scale)
        round_main_weights(group)

    def _update(self, group: ParameterGroup, lr: float, gradient_scale: float | torch.Tensor) -> None:
        change = list(torch._foreach_mul(group.gradient, gradient_scale))
        if group.weight_decay:
            torch._foreach_add_(change, group.main, alpha=group.weight_decay)
        if self._momentum:
            buffers = group.state["momentum_buffer"]
            torch._foreach_mul_(buffers, self._momentum)
            torch._foreach_add_(buffers, change)
            if self._nesterov:
                torch._foreach_add_(change, buffers, alpha=self._momentum)
            else:
                change = buffers
        torch._foreach_add_(group.main, change, alpha=-lr)


class Lion:
    """Lion: the sign of an interpolation between momentum and gradient, with decoupled weight decay.

        w = w (1 - lr weight_decay) - lr sign(beta1 m + (1 - beta1) g)
        m = beta2 m + (1 - beta2) g

    The authors use a learning rate 3 to 10 times smaller than AdamW's, and a larger weight decay by the same factor.

    Paper: Symbolic Discovery of Optimization Algorithms (Chen et al., arXiv 2302.06675).
    """

    state_names: tuple[str, ...] = ("exp_avg",)
    elementwise = True
    refuses_on_device = False

    def __init__(self, config: OptimizerConfig) -> None:
        self._beta1, self._beta2 = config.beta1, config.beta2

    def update(self, group: ParameterGroup, step: UpdateStep) -> None:
        """As UpdateRule.update."""
        for piece in _pieces(group):
            self._update(piece, step.lr, step.gradient_scale)
        round_main_weights(group)

    def _update(self, group: ParameterGroup, lr: float, gradient_scale: float | torch.Tensor) -> None:
        gradient = list(torch._foreach_mul(group.gradient, gradient_scale))
        momentum = group.state["exp_avg"]
        change = list(torch._foreach_mul(momentum, self._beta1))
        torch._foreach_add_(change, gradient, alpha=1 - self._beta1)
        torch._foreach_sign_(change)
        torch._foreach_mul_(momentum, self._beta2)
        torch._foreach_add_(momentum, gradient, alpha=1 - self._beta2)
        torch._foreach_mul_(group.main, 1 - lr * group.weight_decay)
        torch._foreach_add_(group.main, change, alpha=-lr)


def _pieces(group: ParameterGroup) -> Iterator[ParameterGroup]:
    """Cut contiguous tensors on a CPU into pieces that stay in its cache over the passes of an update.

    The pieces have no parameters in lower precision.
    """
    if not group.main[0].is_cpu or not has_values(group.main[0]):  # pieces would only slow a dry run down
        yield group
        return
    for i, main in enumerate(group.main):
        tensors = (main, group.gradient[i], *(state[i] for state in group.state.values()))
        for weight, gradient, *states in zip(
            *(tensor.view(-1).split(_PIECE_ELEMENTS) for tensor in tensors), strict=True
        ):
            state = {kind: [piece] for kind, piece in zip(group.state, states, strict=True)}
            yield ParameterGroup((group.names[i],), [weight], [gradient], state, [], group.weight_decay)


def round_main_weights(group: ParameterGroup) -> None:
    """Round the main weights into the parameters in lower precision."""
    if group.low:
        torch._foreach_copy_(group.low, group.main)


ELEMENTWISE_RULES: Mapping[str, Callable[[OptimizerConfig], UpdateRule]] = {"adamw": AdamW, "sgd": SGD, "lion": Lion}
"""Update rule for each elementwise optimizer.kind."""
