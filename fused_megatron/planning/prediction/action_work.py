"""Seconds of the actions of a pipeline stage, by cause."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Work:
    """Seconds that a rank needs for an action, by cause; `host` runs beside the others on a GPU.

    Attributes:
        products: matrix products, and fused attention.
        memory_bound: all other kernels.
        tensor_parallel, context_parallel, expert_parallel, data_parallel: collectives that nothing hides.
        host: the host's time for the ops of the action.
    """

    products: float = 0.0
    memory_bound: float = 0.0
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0
    expert_parallel: float = 0.0
    data_parallel: float = 0.0
    host: float = 0.0

    # Written out, since a search adds millions of them.
    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.memory_bound + other.memory_bound,
            self.tensor_parallel + other.tensor_parallel,
            self.context_parallel + other.context_parallel,
            self.expert_parallel + other.expert_parallel,
            self.data_parallel + other.data_parallel,
            self.host + other.host,
        )

    def __mul__(self, number: float) -> Work:
        return Work(
            self.products * number,
            self.memory_bound * number,
            self.tensor_parallel * number,
            self.context_parallel * number,
            self.expert_parallel * number,
            self.data_parallel * number,
            self.host * number,
        )

    @property
    def on_device(self) -> float:
        """Seconds of the device, if it never waits for the host."""
        collectives = self.tensor_parallel + self.context_parallel + self.expert_parallel + self.data_parallel
        return self.products + self.memory_bound + collectives

    def seconds(self, device: str) -> float:
        """Return the seconds of an action: a GPU's host runs ahead, a CPU's ops follow each other."""
        return self.on_device + self.host if device == "cpu" else max(self.on_device, self.host)


@dataclass(frozen=True)
class ActionWork:
    """Work of a microbatch in a stage.

    Attributes:
        forward: F.
        backward: B, with the recomputed forward.
        weight_grad: W, the part of backward that a zero-bubble schedule runs later.
    """

    forward: Work
    backward: Work
    weight_grad: Work

    def __add__(self, other: ActionWork) -> ActionWork:
        return ActionWork(
            self.forward + other.forward, self.backward + other.backward, self.weight_grad + other.weight_grad
        )

    def __mul__(self, number: float) -> ActionWork:
        return ActionWork(self.forward * number, self.backward * number, self.weight_grad * number)

    @cached_property
    def totals(self) -> tuple[float, float, float, float, float]:
        """Seconds of the device and of the host for F, then for B; of the device for W."""
        forward, backward = self.forward, self.backward
        return forward.on_device, forward.host, backward.on_device, backward.host, self.weight_grad.products

    def seconds(self, device: str) -> tuple[float, float, float]:
        """Return the seconds of F, I and W."""
        backward = self.backward.seconds(device)
        weight_grad = min(self.weight_grad.products, backward)
        return self.forward.seconds(device), backward - weight_grad, weight_grad
