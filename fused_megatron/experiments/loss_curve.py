"""Loss curve of a small run, and the versions of its weights, on one rank."""

import torch
import torch.distributed as dist

from fused_megatron.assembly.assemble import Assembly, assemble
from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.overlapping_steps import OverlappingStep, run_overlapping_steps
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.assembly.training_step import training_step
from fused_megatron.benchmarking.report.experiment_results import LOSS
from fused_megatron.config import TrainConfig
from fused_megatron.data.batch import Batch

_SHARE = 4  # a quarter of the steps counts as early, and the last quarter as the end


def train_on_rank(config: TrainConfig, steps: int, lr: float) -> dict[str, float]:
    """Train on this rank and measure; every rank of the default process group calls it.

    Args:
        config: with model.vocab_size and the size of every axis.
        steps: their number, at least 4. With an asynchronous schedule they all overlap.
        lr: learning rate of each.

    Returns:
        Figures by name. loss_001, ..: losses of the steps. loss_early, loss_end: mean loss of the second and of the
        last quarter of the steps. weights: bytes of all versions of this rank's weights; versions: their number.
        parameters: of this rank.

    Communication: as the trainer's steps.
    """
    device = torch.device("cpu")
    mesh, plan = build_mesh(config, device.type), plan_pipeline(config, asynchronous=True)
    assembly = assemble(config, mesh, plan, build_stages(config, mesh, plan, device))
    losses = (_overlapping if plan.is_asynchronous else _one_by_one)(assembly, steps, lr)
    versions: list[list[torch.Tensor]] = [list(assembly.parameters.values())]
    for stashed in assembly.executor.stashed.values():
        versions += [list(version.values()) for version in stashed.older()]
    assembly.executor.close()
    part = max(1, steps // _SHARE)
    return {
        "parameters": sum(p.numel() for p in versions[0]),
        "weights": sum(x.numel() * x.element_size() for version in versions for x in version),
        "versions": len(versions),
        "loss_early": sum(losses[part : 2 * part]) / part,
        "loss_end": sum(losses[-part:]) / part,
        **{f"{LOSS}{step:03d}": loss for step, loss in enumerate(losses, 1)},
    }


def _overlapping(assembly: Assembly, steps: int, lr: float) -> list[float]:
    found = [OverlappingStep(_batch(assembly, step), step, lr, _num_targets(assembly)) for step in range(steps)]
    return run_overlapping_steps(assembly, found, tuple, dist.group.WORLD).losses


def _one_by_one(assembly: Assembly, steps: int, lr: float) -> list[float]:
    losses = []
    for step in range(steps):
        sums = training_step(
            assembly,
            lambda step=step: _batch(assembly, step),  # type: ignore[misc]
            step=step,
            lr=lr,
            num_targets=_num_targets(assembly),
            group=dist.group.WORLD,
            flags=tuple,
            num_refusing=0,
            judge=lambda sums: None,
        )
        losses.append(sums.loss)
    return losses


def _num_targets(assembly: Assembly) -> int:
    return assembly.config.training.global_batch_size * assembly.config.model.seq_len


def _batch(assembly: Assembly, step: int) -> Batch:
    """Return rows in which token x is followed by 5 x + 3 or 5 x + 4, modulo the vocabulary."""
    config, mesh = assembly.config, assembly.mesh
    size, length, vocabulary = config.training.global_batch_size, config.model.seq_len, config.model.vocab_size or 1
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(vocabulary, (size, length + 1), generator=generator)
    coins = torch.randint(2, (size, length), generator=generator)
    for position in range(length):
        tokens[:, position + 1] = (5 * tokens[:, position] + 3 + coins[:, position]) % vocabulary
    own = size // mesh.dp_size
    rows = tokens[mesh.dp_rank * own : (mesh.dp_rank + 1) * own]
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
