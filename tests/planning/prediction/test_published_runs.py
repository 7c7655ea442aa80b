"""Start here when a row of a CSV file becomes another run than the one that was measured."""

from pathlib import Path

import pytest

from fused_megatron.checks import InputError
from fused_megatron.planning.parameter_counts import vocabulary_elements
from fused_megatron.planning.prediction.published_runs import read_runs

PUBLISHED = Path(__file__).parents[3] / "benchmarks/published"
GRID = (
    "gpus,global_batch_size,microbatch_size,hidden_size,num_heads,num_layers,seq_len,tensor_parallel_size,"
    "data_parallel_size,pipeline_parallel_size,step_ms\n8,8,2,2048,16,20,1024,4,1,2,160.6\n"
)


def test_a_row_of_a_grid(tmp_path):
    (tmp_path / "grid.csv").write_text(GRID)
    (run,) = read_runs(tmp_path / "grid.csv")
    model, parallel, training = run.config.model, run.config.parallel, run.config.training
    assert (model.num_layers, model.hidden_size, model.num_heads, model.seq_len) == (20, 2048, 16, 1024)
    assert (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size) == (4, 2, 1)
    assert (training.global_batch_size, training.microbatch_size, model.recompute) == (8, 2, "full")
    assert (run.seconds, run.engine) == (0.1606, "megatron-deepspeed")
    assert vocabulary_elements(model, 4) == 50257 // 4 * 2048


def test_each_row_of_table_5_is_two_runs():
    runs = read_runs(PUBLISHED / "korthikanti_2205.05198_table5.csv")
    assert [run.seconds for run in runs[:2]] == [1.42, 1.10]
    assert [run.config.parallel.sequence_parallel for run in runs] == [False, True] * 4
    assert [run.config.parallel.num_ranks for run in runs[::2]] == [8, 64, 280, 512]


def test_a_published_rate_becomes_the_time_of_a_step():
    runs = read_runs(PUBLISHED / "ptdp_2104.04473_table1.csv")
    # Equation 3 of the paper for its 1T model: 163 TFLOP/s a GPU.
    flops = 96 * 3072 * 2048 * 128 * 25600**2 * (1 + 2048 / (6 * 25600) + 51200 / (16 * 128 * 25600))
    assert runs[-1].seconds == pytest.approx(flops / (163e12 * 3072), rel=1e-9)


def test_runs_of_the_tutorial_keep_experts_and_leave_out_what_has_no_time():
    runs = {run.name: run for run in read_runs(PUBLISHED / "tutorial_experiments.csv")}
    assert "tbl101-R7" not in runs  # out of memory
    experts = runs["tbl502-R7"].config
    assert (experts.model.num_experts, experts.model.experts_per_token, experts.model.num_layers) == (256, 8, 16)
    assert (experts.parallel.expert_parallel_size, experts.parallel.expert_tensor_parallel_size) == (4, 2)


def test_every_published_file_is_read():
    for path in PUBLISHED.glob("*.csv"):
        runs = read_runs(path)
        assert len(runs) >= 8
        assert len({run.digest for run in runs}) >= len(runs) / 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a CSV file with rows"),
        ("a,b\n1,2\n", "must be a CSV file with rows"),
        (GRID.replace("160.6", "fast"), "row 2: step_ms='fast' must be a number"),
        (GRID.replace("8,8,2,", "8,8,two,"), "row 2: microbatch_size='two' must be a number"),
        (GRID.replace("160.6", "inf"), "row 2: the time of the step must be above 0, and finite"),
        (GRID.replace("160.6", "160.6,7"), "row 2 must have a cell for each column, and has more"),
        (GRID.replace(",4,1,2,", ",0,1,2,"), "row 2: gpus=8 must be tp x pp x dp = 0 x 2 x 1"),
        (GRID.replace(",4,1,2,", ",4,1,4,"), "row 2: gpus=8 must be tp x pp x dp = 4 x 4 x 1"),
        (GRID.replace("160.6", "1" * 200_000), "must be a CSV file: field larger"),
        (GRID.replace(",16,20,", ",15,20,"), "row 2: hidden_size=2048 must be divisible by num_heads=15"),
        (GRID.replace("160.6", ""), "row 2"),
        (GRID.replace(",160.6", ""), "row 2"),
        (GRID.replace("160.6", "0"), "row 2: the time of the step must be above 0"),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(InputError) as error:
        read_runs(tmp_path / "bad.csv")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv does not exist"):
        read_runs(tmp_path / "none.csv")
