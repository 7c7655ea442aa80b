"""Start here when the errors of predictions against measured steps, or the regret of choices, are summed up wrongly."""

import dataclasses

import pytest

from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.prediction.cluster import Fitted, load_cluster
from fused_megatron.planning.prediction.published_runs import PublishedRun
from fused_megatron.planning.prediction.step_time import predict_step
from fused_megatron.planning.prediction.validation import compare, regrets, summary

CLUSTER = load_cluster("a100")


def _runs(factors, layouts=((1, 4), (2, 2), (4, 1)), batch=16):
    """Return runs whose measured times are the predicted ones, divided by these factors."""
    found = []
    for (tp, dp), factor in zip(layouts, factors, strict=True):
        parallel = ParallelConfig(tensor_parallel_size=tp, data_parallel_size=dp)
        training = TrainingConfig(dtype="bfloat16", global_batch_size=batch, microbatch_size=1)
        config = TrainConfig(model=GPTConfig(vocab_size=1000), parallel=parallel, training=training)
        seconds = predict_step(config, CLUSTER, engine="megatron-core").seconds
        found.append(PublishedRun(f"tp{tp}", config, "megatron-core", seconds / factor, digest=f"{tp}{batch}"))
    return found


def test_errors_are_predicted_over_measured():
    rows = compare(_runs((1.1, 0.9, 1.3)), CLUSTER)
    errors = summary(rows)
    assert errors is not None
    assert (errors.number, errors.mean, errors.median) == (3, pytest.approx(0.5 / 3), pytest.approx(0.1))
    assert (errors.largest, errors.bias) == (pytest.approx(0.3), pytest.approx(0.1))
    assert summary([]) is None


def test_rows_that_the_cluster_names_are_fitted():
    fitted = dataclasses.replace(CLUSTER, fitted=Fitted(5.0, ("megatron-core",), ("216",), {}))
    assert [row.fitted for row in compare(_runs((1, 1, 1)), fitted)] == [False, True, False]


def test_regret_is_of_the_layout_that_is_predicted_to_be_fastest():
    rows = compare(_runs((1, 1, 1)), CLUSTER)
    assert regrets(rows) == [0.0]
    predicted = [row.prediction.seconds for row in rows]
    chosen = predicted.index(min(predicted))
    measured = [2.0, 2.0, 2.0]
    measured[chosen] = 3.0
    runs = [dataclasses.replace(row.run, seconds=time) for row, time in zip(rows, measured, strict=True)]
    assert regrets(compare(runs, CLUSTER)) == [pytest.approx(0.5)]


def test_workloads_with_fewer_than_three_layouts_have_no_choice():
    runs = _runs((1, 1, 1)) + _runs((1, 1), ((1, 4), (2, 2)), batch=32)
    assert len(regrets(compare(runs, CLUSTER))) == 1


def test_layouts_that_cut_the_vocabulary_differently_are_one_workload():
    runs = _runs((1, 1, 1))
    cut = dataclasses.replace(runs[2].config, model=GPTConfig(vocab_size=996))
    runs[2] = dataclasses.replace(runs[2], config=cut)
    assert len(regrets(compare(runs, CLUSTER))) == 1
