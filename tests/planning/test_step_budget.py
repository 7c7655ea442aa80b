"""Start here when the budget of a step (kernels, bytes, waits, collectives) is wrong for a layout."""

import dataclasses

import pytest

from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.step_budget import layer_budget, step_budget

LAYER = {"products": 4, "attention": 1, "norms": 2, "MLP activation": 1, "dropout and residual": 2}


def config(num_layers=3, tp=2, pp=1, dp=1, zero=0, schedule="1f1b", **model):
    form = {"hidden_size": 32, "num_heads": 4, "seq_len": 16, "vocab_size": 100, **model}
    return TrainConfig(
        GPTConfig(num_layers=num_layers, **form),
        ParallelConfig(
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            data_parallel_size=dp,
            zero_stage=zero,
            sequence_parallel=tp > 1,
            schedule=schedule,
        ),
        training=TrainingConfig(global_batch_size=4 * dp, microbatch_size=1, dtype="bfloat16"),
    )


def test_a_layer():
    """The kernels of a block, and the collectives of Korthikanti et al. 2022 with two gathers of operands."""
    budget = layer_budget(config())
    assert +budget.forward.launches == LAYER
    assert budget.backward.launches["products"] == 2 * LAYER["products"]
    assert +budget.forward.collectives == {"all_gather": 2, "reduce_scatter": 2}
    assert +budget.backward.collectives == {"all_gather": 4, "reduce_scatter": 2}
    assert budget.forward.host_syncs == budget.backward.host_syncs == budget.ends.host_syncs == 0
    # x [16, 32], three weights [3 x 32, 32], [128, 32], [32, 128] and [32, 32] in halves, all in bfloat16.
    weights = 12 * 32 * 32 // 2
    results = 16 * (3 * 16 + 32 + 64 + 32)
    inputs = 16 * (32 + 16 + 32 + 64)
    assert budget.forward.moved["products"] == 2 * (weights + results + inputs + 3 * 16)  # and one bias
    # The gradients of the weights are added to float32 sums by the products themselves, as on a GPU.
    assert budget.backward.moved["products"] == 2 * (weights + 2 * (results + inputs)) + 2 * 4 * weights


def test_a_pipeline_has_the_same_layer():
    cut, whole = layer_budget(config(num_layers=4, pp=2)), layer_budget(config(num_layers=2))
    assert (cut.forward, cut.backward) == (whole.forward, whole.backward)
    looped = layer_budget(config(num_layers=4, pp=2, schedule="interleaved_1f1b"))  # two layers more on a rank
    assert (looped.forward, looped.backward) == (whole.forward, whole.backward)


def test_messages_belong_to_the_whole_step():
    budget = step_budget(config(num_layers=2, pp=2))
    assert budget.step.collectives["send"] == budget.step.collectives["receive"] == budget.num_microbatches == 4
    assert budget.update.collectives.keys().isdisjoint({"send", "receive"})


def test_recomputation_runs_the_forward_again():
    plain, again = layer_budget(config()), layer_budget(config(recompute="full"))
    assert again.backward.launches["norms"] == plain.backward.launches["norms"] + LAYER["norms"]
    assert again.backward.collectives["reduce_scatter"] > plain.backward.collectives["reduce_scatter"]


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_step_is_its_parts(zero):
    some = config(num_layers=3, dp=2, zero=zero)
    layer, step = layer_budget(some), step_budget(some)
    assert (step.num_layers, step.num_microbatches, step.step.host_syncs) == (3, 4, 1)
    microbatch = {
        kind: layer.ends.launches[kind] + 3 * (layer.forward.launches[kind] + layer.backward.launches[kind])
        for kind in step.step.launches
    }
    for kind, launches in step.step.launches.items():
        rest = launches - 4 * microbatch[kind] - step.update.launches[kind]
        # Weights are gathered in the first forward, and gradients are summed in the last backward.
        assert rest == 0 or (zero and kind == "copies" and rest > 0), kind
    assert step.update.launches["optimizer"] >= 2


def test_layers_of_two_forms():
    form = {"num_experts": 4, "experts_per_token": 2, "num_dense_layers": 1}
    with pytest.raises(InputError, match="num_dense_layers=0"):
        layer_budget(config(tp=1, **form))
    budget = layer_budget(config(tp=1, **{**form, "num_dense_layers": 0}))
    assert budget.forward.launches["experts"] > 0


@pytest.mark.slow
def test_fewer_layers_than_stages_of_an_uneven_cut():
    """A large vocabulary makes the last stage small: the budget of a layer comes from the first rank."""
    some = dataclasses.replace(config(num_layers=5, pp=2), model=config(num_layers=5, vocab_size=5000).model)
    assert +layer_budget(some).forward.launches == LAYER
