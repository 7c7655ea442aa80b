"""Start here when a step on a CPU is predicted wrong with other numbers of ranks than the calibration had."""

import dataclasses
import math

from fused_megatron.planning.prediction.calibration_steps import Shape
from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.prediction.shared_cores import cores_of_stages, ends_on_cores, of_one_rank
from fused_megatron.planning.prediction.step_time import predict_step

GPU = load_cluster("h100")
CPU = dataclasses.replace(GPU, device="cpu", gpus_per_node=2, transfer_overlap=0.0)


def test_ranks_divide_the_cores() -> None:
    assert of_one_rank(CPU, 1).peak_tflops == 2 * CPU.peak_tflops
    assert of_one_rank(CPU, 1).launch_us == CPU.launch_us
    assert of_one_rank(CPU, 2) == of_one_rank(CPU, 4) == CPU
    assert of_one_rank(GPU, 1) == GPU
    # A pipeline rank has its tensor-parallel ranks and replicas beside it, which need cores, too.
    assert [cores_of_stages(CPU, ranks, 1) for ranks in (1, 2, 4)] == [math.inf, math.inf, 0.5]
    assert [cores_of_stages(CPU, 4, stages) for stages in (2, 4)] == [1, 2]
    assert cores_of_stages(GPU, 512, 4) == math.inf


def test_the_end_of_a_step_is_shared_too() -> None:
    assert ends_on_cores([0.0, 1.0], [1.0, 1.0], math.inf) == [1.0, 2.0]
    assert ends_on_cores([0.0, 0.0], [1.0, 1.0], 1) == [2.0, 2.0]
    assert ends_on_cores([0.0, 1.0], [1.0, 1.0], 0.5) == [3.0, 4.0]


def test_a_step_of_more_ranks_than_cores_takes_their_work_in_turn() -> None:
    shape = Shape(16, 64, 4, 64, 32, 2, 4)
    busy = shape.config("float32", data_parallel_size=4, zero_stage=0)
    two, four = (dataclasses.replace(CPU, gpus_per_node=cores, step_ms=0.0) for cores in (2, 4))
    assert 1.9 < predict_step(busy, two).seconds / predict_step(busy, four).seconds <= 2
    # The waits of a pipeline are filled by other ranks of the core.
    pipeline = shape.config("float32", pipeline_parallel_size=4)
    assert 1 < predict_step(pipeline, two).seconds / predict_step(pipeline, four).seconds < 1.6
    for cluster in (two, four):
        for config in (busy, pipeline):
            prediction = predict_step(config, cluster)
            assert abs(sum(prediction.parts.values()) - prediction.seconds) < 1e-9 * prediction.seconds
