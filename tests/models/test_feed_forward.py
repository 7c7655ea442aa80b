"""Start here when a block's feed-forward is not the configured one, or its auxiliary loss gets lost."""

from dataclasses import dataclass

import pytest
import torch

from fused_megatron.assembly.model_stages import ModelStages
from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig
from fused_megatron.mesh import init_mesh
from fused_megatron.models import GPT, ParallelMLP, cut_stages
from fused_megatron.models.feed_forward import FEED_FORWARDS
from fused_megatron.modules.auxiliary_loss import WithAuxiliaryLoss
from fused_megatron.pipeline import PipelineExecutor, build_schedule
from fused_megatron.testing.run_on_ranks import run_on_ranks

SIZES = {"num_layers": 4, "hidden_size": 16, "num_heads": 2, "seq_len": 8, "vocab_size": 31, "init_std": 0.2}
MICROBATCHES, DIVISOR = 4, 4 * 2 * 8


@dataclass(frozen=True)
class SquaredConfig(GPTConfig):
    """GPT whose feed-forward must keep its output small."""

    tied_embeddings: bool = False

    @property
    def feed_forward(self):
        return "squared"


class Squared(ParallelMLP):
    def forward(self, x):
        y, bias = super().forward(x)
        return WithAuxiliaryLoss((y, bias), 0.3 * y.square().sum()) if self.training else (y, bias)


def new_squared(config, *, layout, dtype, device):
    return Squared(config, layout=layout, skip_bias_add=True, dtype=dtype, device=device)


@pytest.fixture
def squared(monkeypatch):
    monkeypatch.setitem(FEED_FORWARDS, "squared", new_squared)


def microbatches():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(31, (2 * MICROBATCHES, 9), generator=generator)
    return tokens[:, :-1].split(2), tokens[:, 1:].split(2)


def plain_step(config):
    """Return losses with and without the auxiliary ones, and gradients, by autograd of the whole model."""
    model = GPT(config, seed=3, dtype=torch.float64)
    loss = auxiliary = 0.0
    for tokens, target in zip(*microbatches(), strict=True):
        given = model(tokens, target, reduction="sum")
        loss, auxiliary = loss + given.output, auxiliary + given.auxiliary_loss
    ((loss + auxiliary) / DIVISOR).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return float(loss.detach() + auxiliary.detach()) / DIVISOR, float(loss.detach()) / DIVISOR, gradients


def pipeline_step(rank, world_size, schedule_name, stages_per_rank, recompute):
    """Return (loss of a step, loss of an evaluation, gradients of this rank) of a pipeline."""
    FEED_FORWARDS["squared"] = new_squared
    config = SquaredConfig(**SIZES, recompute=recompute)
    mesh = init_mesh(pipeline_parallel_size=world_size)
    schedule = build_schedule(schedule_name, world_size, MICROBATCHES, stages_per_rank)
    spans = cut_stages(config, schedule.num_stages, placement=schedule.placement)
    stages = ModelStages(
        spans,
        schedule.placement,
        mesh.pp_group,
        lambda span: GPT(config, layout=mesh.layout(), seed=3, stage=span, dtype=torch.float64),
    )
    executor = PipelineExecutor(
        schedule,
        stages.stages,
        pp_group=mesh.pp_group,
        loss_fn=stages.loss_sum if len(spans) - 1 in stages.stages else None,
        auxiliary_losses=True,
        timeout_s=50,
    )
    inputs, targets = microbatches()
    loss = float(executor.step(inputs, targets, loss_divisor=DIVISOR))
    gradients = {name: p.grad for name, p in stages.parameters_by_name().items()}
    # The stages are still in training mode: evaluation itself leaves auxiliary losses out.
    evaluated = float(executor.evaluate(inputs, targets, loss_divisor=DIVISOR))
    executor.close()
    return loss, evaluated, gradients


@pytest.mark.parametrize(("ranks", "schedule", "stages_per_rank", "recompute"), [
    (1, "1f1b", 1, "none"), (2, "1f1b", 1, "full"), (2, "zb_v", 2, "none"),
])  # fmt: skip
def test_every_stage_learns_from_its_auxiliary_loss_as_one_process_does(
    squared, ranks, schedule, stages_per_rank, recompute
):
    loss, alone, gradients = plain_step(SquaredConfig(**SIZES))
    assert loss > alone + 0.01
    found = {}
    for rank_loss, evaluated, rank_gradients in run_on_ranks(
        pipeline_step, ranks, schedule, stages_per_rank, recompute
    ):
        assert rank_loss == pytest.approx(loss, rel=1e-12) and evaluated == pytest.approx(alone, rel=1e-12)
        found |= rank_gradients
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def without_the_word(rank, world_size):
    FEED_FORWARDS["squared"] = new_squared
    schedule = build_schedule("1f1b", 1, MICROBATCHES)
    stages = {0: GPT(SquaredConfig(**SIZES), seed=3)}
    executor = PipelineExecutor(schedule, stages, pp_group=None, loss_fn=lambda y, target: y.sum())
    with pytest.raises(InputError, match="auxiliary_losses=True") as caught:
        executor.step(*microbatches(), loss_divisor=1.0)
    return str(caught.value)


def differing_words(rank, world_size):
    mesh = init_mesh(pipeline_parallel_size=2)
    schedule = build_schedule("1f1b", 2, MICROBATCHES)
    with pytest.raises(InputError) as caught:
        PipelineExecutor(
            schedule,
            {rank: torch.nn.Linear(2, 2)},
            pp_group=mesh.pp_group,
            loss_fn=lambda y, target: y.sum(),
            auxiliary_losses=rank == 1,
        )
    return str(caught.value)


def test_an_executor_must_be_told_and_all_ranks_alike():
    assert "on every rank" in run_on_ranks(without_the_word, 1)[0]
    for message in run_on_ranks(differing_words, 2):
        assert message == "auxiliary_losses=False on rank 0 must be the same on rank 1"


def test_evaluation_and_sampling_see_no_auxiliary_loss(squared):
    model = GPT(SquaredConfig(**SIZES), seed=3)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    assert isinstance(model(tokens), WithAuxiliaryLoss)
    assert isinstance(model.eval()(tokens), torch.Tensor)


def test_a_feed_forward_that_is_not_known(squared, monkeypatch):
    monkeypatch.delitem(FEED_FORWARDS, "squared")
    with pytest.raises(InputError, match="feed_forward='squared' must be one of: 'mlp'"):
        GPT(SquaredConfig(**SIZES))
