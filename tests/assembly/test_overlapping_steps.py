"""Start here when PipeDream or PipeDream-2BW trains a GPT by another update rule than the stated one."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fused_megatron.assembly.assemble import Assembly, assemble
from fused_megatron.assembly.build import build_mesh, build_stages, stage_spans
from fused_megatron.assembly.overlapping_steps import OverlappingStep, run_overlapping_steps, steps_until_pause
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.config import DataConfig, GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.data.batch import Batch
from fused_megatron.models import GPT, new_model
from fused_megatron.sharding import parameter_parts
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks

VOCABULARY, LENGTH, STEPS, CLIP = 37, 6, 6, 0.3
# eps keeps AdamW from making an update of the rounding of a tiny gradient.
OPTIMIZER: dict[str, Any] = {"lr": 2e-2, "weight_decay": 0.1, "eps": 1e-3, "clip_norm": CLIP}
MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 16,
    "num_heads": 4,
    "seq_len": LENGTH,
    "vocab_size": VOCABULARY,
}


def config_of(
    schedule: str, pp: int, microbatches: int, model: dict[str, Any], training: dict[str, Any], **parallel: Any
) -> TrainConfig:
    layout = {"data_parallel_size": 1} | parallel
    return TrainConfig(
        GPTConfig(**MODEL, tied_embeddings=False, **model),
        ParallelConfig(pipeline_parallel_size=pp, schedule=schedule, **layout),
        DataConfig(),
        OptimizerConfig(**OPTIMIZER),
        TrainingConfig(
            global_batch_size=2 * microbatches * layout["data_parallel_size"], microbatch_size=2, **training
        ),
    )


FLOAT32: dict[str, Any] = {"dtype": "float32"}
CASES = {
    "pp2": [
        config_of("pipedream_2bw", 2, 3, {}, FLOAT32),
        config_of("pipedream", 2, 1, {}, FLOAT32, pipeline_cut=(1, 3)),
    ],
    "pp3": [
        config_of("pipedream_2bw", 3, 4, {}, FLOAT32),
        config_of("pipedream", 3, 1, {}, FLOAT32, pipeline_cut=(2, 1, 1)),
    ],
    "4 ranks": [
        config_of("pipedream_2bw", 2, 2, {}, FLOAT32, data_parallel_size=2),
        config_of("pipedream", 2, 1, {}, FLOAT32, tensor_parallel_size=2, sequence_parallel=True),
    ],
    "4 ranks, more": [
        config_of("pipedream_2bw", 4, 5, {"recompute": "full"}, FLOAT32),
        config_of("pipedream", 4, 1, {"recompute": "full"}, FLOAT32),
        config_of("pipedream", 2, 1, {}, FLOAT32, data_parallel_size=2, zero_stage=0),
        config_of("pipedream_2bw", 2, 3, {}, FLOAT32, tensor_parallel_size=2, pipeline_cut=(3, 1)),
        config_of("pipedream_2bw", 2, 3, {}, FLOAT32, context_parallel_size=2),
    ],
}


def assembled(config: TrainConfig) -> Assembly:
    mesh, plan = build_mesh(config), plan_pipeline(config, asynchronous=True)
    return assemble(config, mesh, plan, build_stages(config, mesh, plan, torch.device("cpu")))


def tokens_of(config: TrainConfig, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (config.training.global_batch_size, LENGTH + 1), generator=generator)
    return tokens


def targets_of(tokens: torch.Tensor, step: int) -> torch.Tensor:
    """Return targets of which a different number counts in each step."""
    targets = tokens[:, 1:].clone()
    targets[:, : step % 3] = -100
    return targets


def lr_of(step: int) -> float:
    return OPTIMIZER["lr"] / (1 + step)


def steps_of(assembly: Assembly, numbers: Sequence[int]) -> list[OverlappingStep]:
    found, mesh = [], assembly.mesh
    for number in numbers:
        tokens = tokens_of(assembly.config, number)
        targets = targets_of(tokens, number)
        own = len(tokens) // mesh.dp_size
        rows = slice(mesh.dp_rank * own, (mesh.dp_rank + 1) * own)
        batch = Batch(tokens[rows, :-1].contiguous(), targets[rows].contiguous())
        found.append(OverlappingStep(batch, number, lr_of(number), int((targets >= 0).sum())))
    return found


def parts_of_weights(assembly: Assembly) -> dict[str, tuple[tuple[slice, ...], torch.Tensor]]:
    """Return this rank's parts of full parameters: where each part is, and its values."""
    found = {}
    for name, parameter in assembly.parameters.items():
        for part in parameter_parts(parameter):
            held = part.held(parameter.detach())
            found[part.full_name(name)] = (held.box.slices(), held.tensor.clone())
    return found


def train(rank: int, world_size: int, config: TrainConfig, calls: Sequence[int] = (4, 2)) -> Any:
    """Train in calls of these numbers of steps; return losses, norms, and this rank's weights."""
    assembly, first, losses, norms = assembled(config), 0, [], []
    for count in calls:
        steps = steps_of(assembly, range(first, first + count))
        sums = run_overlapping_steps(assembly, steps, lambda: [1.0], dist.group.WORLD if world_size > 1 else None)
        assert sums.flags == [world_size]
        losses, norms, first = losses + sums.losses, norms + sums.gradient_norms, first + count
    assert assembly.find_drift() is None
    weights = parts_of_weights(assembly)
    assembly.executor.close()
    return losses, norms, weights


class Reference:
    """One process in float64 that keeps all versions of all weights, and plays the update rule from its formula.

    w_s(t + 1) = w_s(t) - update(gradient of s at weights w_r(t - d_r) of every stage r, clipped over s), with d_r = 1
    (2bw) or the number of stages behind r (stashing).
    """

    def __init__(self, config: TrainConfig) -> None:
        self.model = new_model(config.model, seed=config.training.seed).double()
        self.parameters = dict(self.model.named_parameters())
        spans = stage_spans(config, plan_pipeline(config, asynchronous=True))
        self.stages: list[list[str]] = [[] for _ in spans]
        for name in self.parameters:
            self.stages[self._stage(name, spans)].append(name)
        behind = [1 if config.parallel.schedule == "pipedream_2bw" else len(spans) - 1 - s for s in range(len(spans))]
        self.behind = {name: behind[stage] for stage, names in enumerate(self.stages) for name in names}
        self.versions = {name: [p.detach().clone()] for name, p in self.parameters.items()}
        groups = [
            {"params": [p for p in self.parameters.values() if (p.dim() >= 2) == decays], "weight_decay": 0.1 * decays}
            for decays in (True, False)
        ]
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)

    @staticmethod
    def _stage(name: str, spans: Any) -> int:
        if name.startswith("blocks."):
            block = int(name.split(".")[1])
            return next(span.index for span in spans if span.start <= block < span.stop)
        return 0 if "embedding" in name else len(spans) - 1

    def step(self, number: int, config: TrainConfig) -> tuple[float, float]:
        tokens = tokens_of(config, number)
        targets = targets_of(tokens, number)
        self._show({name: values[-1 - self.behind[name] :][0] for name, values in self.versions.items()})
        losses = self.model(tokens[:, :-1], targets)
        loss = losses.sum() / (targets >= 0).sum()
        loss.backward()
        self._show({name: values[-1] for name, values in self.versions.items()})
        squares = 0.0
        for names in self.stages:
            gradients = [self.parameters[name].grad for name in names]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
            squares += norm.item() ** 2
            torch._foreach_mul_(gradients, min(1.0, CLIP / (norm.item() + 1e-6)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr_of(number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, parameter in self.parameters.items():
            self.versions[name].append(parameter.detach().clone())
        return loss.item(), squares**0.5

    def _show(self, values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)


def check_case(config: TrainConfig, answers: Sequence[Any]) -> None:
    reference = Reference(config)
    wanted = [reference.step(number, config) for number in range(STEPS)]
    full = {
        part.full_name(name): part.held(p.detach()).tensor
        for name, p in reference.parameters.items()
        for part in parameter_parts(p)
    }
    seen = set()
    for losses, norms, weights in answers:
        assert losses == pytest.approx([loss for loss, _ in wanted], rel=2e-6)
        assert norms == pytest.approx([norm for _, norm in wanted], rel=2e-5)
        for name, (index, values) in weights.items():
            torch.testing.assert_close(values.double(), full[name][index], rtol=0, atol=2e-6)
            seen.add(name)
    assert seen == set(full)


@pytest.mark.parametrize("name", [*[*CASES][:3], pytest.param("4 ranks, more", marks=pytest.mark.slow)])
def test_losses_and_weights_are_of_the_update_rule(name: str) -> None:
    cases = CASES[name]
    ranks = cases[0].parallel.num_ranks
    answers = run_cases_on_ranks(train, ranks, [(config,) for config in cases])
    for config, of_ranks in zip(cases, answers, strict=True):
        check_case(config, of_ranks)


def test_steps_overlap_until_the_run_pauses() -> None:
    training = TrainingConfig(num_steps=20, eval_interval=6, checkpoint_interval=10, replica_check_interval=0)
    found, step = [], 0
    while step < training.num_steps:
        found.append(steps_until_pause(step, training, 5))
        step += found[-1]
    assert found == [5, 1, 4, 2, 5, 1, 2]


def test_a_stage_keeps_its_weights_once_its_gradients_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("pipedream_2bw", 1, 1, {}, FLOAT32)
    whole, poisoned = assembled(config), assembled(config)
    run_overlapping_steps(whole, steps_of(whole, range(2)), tuple, None)
    calls: list[int] = []
    original = GPT.loss

    def loss(self: GPT, *arguments: Any, **keywords: Any) -> torch.Tensor:
        calls.append(0)
        return original(self, *arguments, **keywords) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(GPT, "loss", loss)
    sums = run_overlapping_steps(poisoned, steps_of(poisoned, range(4)), tuple, None)
    assert [math.isfinite(each) for each in sums.losses] == [True, True, False, True]
    for one, other in zip(whole.parameters.values(), poisoned.parameters.values(), strict=True):
        assert torch.equal(one, other)
