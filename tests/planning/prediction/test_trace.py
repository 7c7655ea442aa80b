"""Start here when the trace of a predicted step does not open in Perfetto, or has not all actions."""

from pathlib import Path

from fused_megatron.pipeline.view.trace_file import read_trace
from fused_megatron.planning.prediction.calibration_steps import Shape
from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.prediction.step_time import predict_step
from fused_megatron.planning.prediction.trace import write_trace


def test_a_row_for_each_rank_and_a_box_for_each_action(tmp_path: Path) -> None:
    config = Shape(4, 64, 4, 256, 32, 1, 6).config("bfloat16", pipeline_parallel_size=2)
    prediction = predict_step(config, load_cluster("h100"))
    write_trace(prediction, tmp_path / "step.json")
    (timeline,) = read_trace(tmp_path / "step.json").values()
    assert [len(row) for row in timeline.events] == [12, 12]
    assert abs(timeline.makespan - prediction.timeline.makespan) < 1e-9
