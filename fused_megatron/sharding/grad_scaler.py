"""Gradient scaler whose ranks skip a step together."""

from typing import Any

import torch
import torch.distributed as dist

from fused_megatron.checks import InputError
from fused_megatron.collectives import Group, group_size
from fused_megatron.mesh import Mesh


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler for models whose ranks hold different gradients.

    torch's scaler looks at this rank's gradients only. If one rank's shard has an infinity, that rank skips the step
    and halves its scale, the other ranks step, and the weights drift apart. Here the ranks exchange their findings, and
    all of them skip or none.

        scaler = fm.GradScaler(mesh)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        fm.clip_grad_norm_(model, 1.0)
        scaler.step(optimizer)
        scaler.update()

    Args:
        mesh: the mesh or process group whose ranks step together; None for this rank only.
        device: as torch's; also init_scale, growth_factor, backoff_factor, growth_interval, enabled.

    Raises:
        InputError: a group without this rank.
        TypeError: neither a mesh nor a group.

    Communication: for each optimizer and step one all-reduce of one number over each group of several ranks.
    """

    def __init__(self, mesh: Mesh | Group, device: str = "cuda", **options: Any) -> None:
        if mesh is not None and not isinstance(mesh, Mesh | dist.ProcessGroup):
            raise TypeError(f"mesh={type(mesh).__name__} must be what fused_megatron.init_mesh returns, or a group")
        groups = mesh.groups.values() if isinstance(mesh, Mesh) else [mesh]
        super().__init__(device, **options)
        self._groups = [group for group in groups if group_size(group) > 1]

    def _unscale_grads_(self, *args: Any, **kwargs: Any) -> dict[torch.device, torch.Tensor]:
        """Unscale, and exchange the infinities found. unscale_ and optimizers that unscale by themselves call this."""
        found: dict[torch.device, torch.Tensor] = super()._unscale_grads_(*args, **kwargs)
        if not self._groups:
            return found
        if self._scale is None:
            raise InputError("scale(loss) must be called before gradients are unscaled")
        # A rank without any gradient joins the collective, too.
        found = found or {self._scale.device: torch.zeros((), device=self._scale.device)}
        anywhere = torch.stack([flag.detach().reshape(()).to(self._scale.device) for flag in found.values()]).amax()
        for group in self._groups:
            dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=group)
        for flag in found.values():
            flag.copy_(anywhere)
        return found
