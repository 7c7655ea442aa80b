"""AdamW over float32 main weights, by parameter name."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from fused_megatron import ops
from fused_megatron.config import OptimizerConfig
from fused_megatron.observe.waits import OPTIMIZER, wait_for


class _Group(NamedTuple):
    """Names of parameters that are updated together: of one dtype, and with one weight decay."""

    names: Sequence[str]
    weight_decay: float
    has_main_weights: bool


class Optimizer:
    """AdamW, with float32 main weights for parameters of lower precision.

    Each step reads and writes the tensors of the optimizer once, and rounds the main weights to the parameters in the
    same pass.

    Args:
        parameters: trainable parameters by name, or the parts of them that this rank updates.
        gradients: float32 gradients by the same names, in the shapes of `parameters`; step() reads them.
        config: learning rate and the other options of AdamW.

    Memory: 8 bytes an element for the two moments, 4 more for the main weight of a parameter that is not float32.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor], config: OptimizerConfig
    ) -> None:
        self._parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        self._gradients = {name: gradients[name] for name in parameters}
        self._config = config
        self.main = {name: p if p.dtype == torch.float32 else p.float() for name, p in self._parameters.items()}
        # Made before the first step, so that a checkpoint can be loaded into a new optimizer.
        self._exp_avg = {name: torch.zeros_like(main) for name, main in self.main.items()}
        self._exp_avg_sq = {name: torch.zeros_like(main) for name, main in self.main.items()}
        self._num_updates = 0
        self._groups = self._grouped()

    def _grouped(self) -> list[_Group]:
        groups: dict[tuple[bool, torch.dtype], list[str]] = {}
        for name, parameter in self._parameters.items():
            groups.setdefault((parameter.dim() >= 2, parameter.dtype), []).append(name)
        return [
            _Group(names, self._config.weight_decay if decayed else 0.0, dtype != torch.float32)
            for (decayed, dtype), names in groups.items()
        ]

    def step(self, lr: float, gradient_scale: float | torch.Tensor = 1.0) -> None:
        """Update the parameters once, from the gradients times gradient_scale (a clip coefficient)."""
        self._num_updates += 1
        wait_for(OPTIMIZER, lambda: self._update(lr, gradient_scale))

    def _update(self, lr: float, gradient_scale: float | torch.Tensor) -> None:
        config = self._config
        for names, weight_decay, has_main_weights in self._groups:
            ops.adamw_(
                [self.main[name] for name in names],
                [self._exp_avg[name] for name in names],
                [self._exp_avg_sq[name] for name in names],
                [self._gradients[name] for name in names],
                low=[self._parameters[name] for name in names] if has_main_weights else (),
                step=self._num_updates,
                lr=lr,
                beta1=config.beta1,
                beta2=config.beta2,
                eps=config.eps,
                weight_decay=weight_decay,
                gradient_scale=gradient_scale,
            )

    def round_main_weights(self) -> None:
        """Set parameters of lower precision to their main weights (after loading only main weights)."""
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                parameter.copy_(self.main[name])

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the tensors to save besides the model's, by parameter name: the moments, and separate main weights."""
        state = {}
        for name, main in self.main.items():
            state[name] = {"exp_avg": self._exp_avg[name], "exp_avg_sq": self._exp_avg_sq[name]}
            if self._parameters[name].dtype != torch.float32:
                state[name]["main"] = main
        return state

    def reset_main_weights(self) -> None:
        """Set the main weights to the parameters (after loading only weights)."""
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                self.main[name].copy_(parameter)

    def set_step(self, step: int) -> None:
        """Set the number of updates that the moments contain (after loading them)."""
        self._num_updates = step
