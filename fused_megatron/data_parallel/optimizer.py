"""Optimizer of one rank: an update rule for each parameter, with float32 main weights."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from fused_megatron.config import OptimizerConfig
from fused_megatron.data_parallel.fixed_sizes import BATCH_ELEMENTS
from fused_megatron.data_parallel.stochastic_state import StochasticState
from fused_megatron.data_parallel.update_rules import ELEMENTWISE_RULES, ParameterGroup, UpdateRule, UpdateStep
from fused_megatron.observe.waits import OPTIMIZER, wait_for


class _Group(NamedTuple):
    """Names of parameters that are updated together: they have the same rule, dtype and weight decay."""

    rule: UpdateRule
    names: Sequence[str]
    weight_decay: float
    has_main_weights: bool


class Optimizer:
    """Update of parameters by the rule of optimizer.kind; parameters in lower precision have float32 main weights.

    Each step reads gradients, main weights and state, and rounds the main weights into the parameters.

    Args:
        parameters: trainable parameters by name, or the parts of them that this rank updates.
        gradients: float32 gradients by the same names, in the shapes of `parameters`; step() reads them.
        config: update rule, learning rate and the other options.
        other_rules: rules of single parameters, by name, in place of the rule of config.kind (Muon for matrices).
        rounding: stochastic rounding of state to bfloat16; needed with config.state_dtype="bfloat16".

    Memory: 4 bytes an element, or 2 in bfloat16, for each state tensor (AdamW two; SGD with momentum, Lion and Muon
        one); 4 more for the main weight of a parameter that is not float32. While SGD and Lion update on a GPU: 8 bytes
        for each of BATCH_ELEMENTS. While state in bfloat16 is updated: 4 bytes for each of BATCH_ELEMENTS and state
        tensor; with Muon for every element of the rank's matrices.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        gradients: Mapping[str, torch.Tensor],
        config: OptimizerConfig,
        other_rules: Mapping[str, UpdateRule] | None = None,
        rounding: StochasticState | None = None,
    ) -> None:
        assert (rounding is None) == (config.state_dtype == "float32")
        self._parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        self._gradients = {name: gradients[name] for name in parameters}
        self.main = {name: p if p.dtype == torch.float32 else p.float() for name, p in self._parameters.items()}
        self._num_updates, self._rounding = 0, rounding
        own_rule: UpdateRule = ELEMENTWISE_RULES.get(config.kind, ELEMENTWISE_RULES["adamw"])(config)
        rules = {name: (other_rules or {}).get(name, own_rule) for name in parameters}
        # The state exists before the first step, so that a checkpoint can be loaded into a new optimizer.
        dtype = getattr(torch, config.state_dtype)
        self._state = {
            name: {kind: torch.zeros_like(self.main[name], dtype=dtype) for kind in rule.state_names}
            for name, rule in rules.items()
        }
        self._groups = self._grouped(rules, config.weight_decay)

    def _grouped(self, rules: Mapping[str, UpdateRule], weight_decay: float) -> list[_Group]:
        groups: dict[tuple[UpdateRule, bool, torch.dtype], list[str]] = {}
        for name, parameter in self._parameters.items():
            groups.setdefault((rules[name], parameter.dim() >= 2, parameter.dtype), []).append(name)
        return [
            _Group(rule, names, weight_decay if decayed else 0.0, dtype != torch.float32)
            for (rule, decayed, dtype), names in groups.items()
        ]

    @property
    def refuses_on_device(self) -> bool:
        """Whether step() takes `refused` and `zeroes_gradients`: every rule reads them."""
        return all(group.rule.refuses_on_device for group in self._groups)

    def step(
        self,
        lr: float,
        gradient_scale: float | torch.Tensor = 1.0,
        refused: torch.Tensor | None = None,
        *,
        zeroes_gradients: bool = False,
    ) -> None:
        """Update the parameters once.

        Args:
            lr: learning rate.
            gradient_scale: factor of the gradients (a clip coefficient): a number, or a float32 tensor of one element
                that the host has not read.
            refused: bool tensor of one element; if it is True on the device, weights, state and gradients stay as they
                are. It must be None unless refuses_on_device.
            zeroes_gradients: set the gradients to 0 in the same pass; only with refuses_on_device.
        """
        assert (refused is None and not zeroes_gradients) or self.refuses_on_device
        self._num_updates += 1
        step = UpdateStep(self._num_updates, lr, gradient_scale, refused, zeroes_gradients)
        wait_for(OPTIMIZER, lambda: self._update(step))

    def _update(self, step: UpdateStep) -> None:
        for group in self._groups:
            for names in self._batches(group):
                self._update_batch(group, names, step)

    def _batches(self, group: _Group) -> Iterator[Sequence[str]]:
        """Cut an elementwise group into batches of at most BATCH_ELEMENTS, or of one tensor."""
        if not group.rule.elementwise:
            yield group.names
            return
        batch: list[str] = []
        elements = 0
        for name in group.names:
            if batch and elements + self.main[name].numel() > BATCH_ELEMENTS:
                yield batch
                batch, elements = [], 0
            batch.append(name)
            elements += self.main[name].numel()
        yield batch

    def _update_batch(self, group: _Group, names: Sequence[str], step: UpdateStep) -> None:
        tensors = ParameterGroup(
            names,
            main=[self.main[name] for name in names],
            gradient=[self._gradients[name] for name in names],
            # float() returns a float32 tensor itself, and copies a bfloat16 tensor.
            state={kind: [self._state[name][kind].float() for name in names] for kind in group.rule.state_names},
            low=[self._parameters[name] for name in names] if group.has_main_weights else [],
            weight_decay=group.weight_decay,
        )
        group.rule.update(tensors, step)
        if self._rounding is not None and tensors.state:
            for name, *wide in zip(names, *tensors.state.values(), strict=True):
                # State that was refused an update is exact in bfloat16, and so keeps its value.
                self._rounding.store(name, step.number, wide, list(self._state[name].values()))

    def follow(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Update these tensors from now on: the parameters, with the same values, have moved to other memory."""
        for name, parameter in parameters.items():
            if self.main[name] is self._parameters[name]:
                self.main[name] = parameter.detach()
                self._parameters[name] = self.main[name]
            else:
                self._parameters[name] = parameter.detach()

    def round_main_weights(self) -> None:
        """Round the main weights into the parameters in lower precision (after loading only main weights)."""
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                parameter.copy_(self.main[name])

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the tensors to save besides the model, by parameter name: state and separate main weights.

        State tensors have the names of torch's optimizers; a main weight has the name "main".
        """
        state = {name: dict(tensors) for name, tensors in self._state.items()}
        for name, main in self.main.items():
            if self._parameters[name].dtype != torch.float32:
                state[name]["main"] = main
        return state

    def reset_main_weights(self) -> None:
        """Set the main weights to the parameters (after loading only weights)."""
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                self.main[name].copy_(parameter)

    def set_step(self, step: int) -> None:
        """Set the number of updates that the state contains (after loading it)."""
        self._num_updates = step
