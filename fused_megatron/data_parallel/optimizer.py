"""AdamW over float32 main weights, by parameter name."""

from collections.abc import Mapping

import torch

from fused_megatron.config import OptimizerConfig


class Optimizer:
    """torch's fused AdamW, with float32 main weights for parameters of lower precision.

    After each step the main weights are rounded to the parameters.

    Args:
        parameters: trainable parameters by name, or the parts of them that this rank updates.
        gradients: float32 gradients by the same names, in the shapes of `parameters`; step() reads and scales them.
        config: learning rate and the other options of AdamW.

    Memory: 8 bytes an element for the two moments, 4 more for the main weight of a parameter that is not float32.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor], config: OptimizerConfig
    ) -> None:
        self._parameters = dict(parameters)
        self._gradients = {name: gradients[name] for name in parameters}
        self.main = {
            name: p.detach() if p.dtype == torch.float32 else p.detach().float() for name, p in parameters.items()
        }
        decayed = [name for name, p in parameters.items() if p.dim() >= 2]
        plain = [name for name, p in parameters.items() if p.dim() < 2]
        groups = [
            {"params": [self.main[name] for name in names], "weight_decay": decay}
            for names, decay in ((decayed, config.weight_decay), (plain, 0.0))
            if names
        ]
        self._adamw = torch.optim.AdamW(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
        )
        # The state exists before the first step, so that a checkpoint can be loaded into a new optimizer.
        for name, main in self.main.items():
            main.grad = self._gradients[name]
            self._adamw.state[main] = {
                "step": torch.zeros((), dtype=torch.float32, device=main.device),
                "exp_avg": torch.zeros_like(main),
                "exp_avg_sq": torch.zeros_like(main),
            }

    def step(self, lr: float, gradient_scale: float = 1.0) -> None:
        """Update the parameters once, from the gradients times gradient_scale; this scales the gradients in place."""
        if gradient_scale != 1.0:
            torch._foreach_mul_(list(self._gradients.values()), gradient_scale)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                parameter.detach().copy_(self.main[name])

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the tensors to save besides the model's, by parameter name: the moments, and separate main weights."""
        state = {}
        for name, main in self.main.items():
            moments = self._adamw.state[main]
            state[name] = {"exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
            if self._parameters[name].dtype != torch.float32:
                state[name]["main"] = main
        return state

    def reset_main_weights(self) -> None:
        """Set the main weights to the parameters (after loading only weights)."""
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                self.main[name].copy_(parameter.detach())

    def set_step(self, step: int) -> None:
        """Set the number of updates that the moments contain (after loading them)."""
        for main in self.main.values():
            self._adamw.state[main]["step"].fill_(float(step))
