"""Start here when `calibrate --steps` learns wrong factors, or predictions do not use them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.config.config_file import config_text
from fused_megatron.planning.prediction.calibrate_command import CalibrateArguments, run_calibrate
from fused_megatron.planning.prediction.cluster import MeasuredBlock, block_shape, cluster_text, load_cluster
from fused_megatron.planning.prediction.measured_blocks import read_steps, with_measured_blocks
from fused_megatron.planning.prediction.published_runs import PublishedRun
from fused_megatron.planning.prediction.step_time import predict_step
from fused_megatron.planning.prediction.validation import compare

H100 = load_cluster("h100")


def config(tp: int = 1, pp: int = 1, dp: int = 1, microbatch: int = 2, recompute: str = "none") -> TrainConfig:
    model = GPTConfig(num_layers=4, hidden_size=1024, num_heads=16, seq_len=2048, vocab_size=50304, recompute=recompute)
    parallel = ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp)
    training = TrainingConfig(global_batch_size=32, microbatch_size=microbatch, dtype="bfloat16")
    return TrainConfig(model=model, parallel=parallel, training=training)


def run(made: TrainConfig, seconds: float, digest: str = "aa") -> PublishedRun:
    return PublishedRun("a run", made, "fused-megatron", seconds, digest)


def test_a_factor_changes_the_blocks_alone() -> None:
    """A step without a pipeline grows by the blocks' time, which layers that are added show too."""
    made = config()
    deeper = replace(made, model=replace(made.model, num_layers=8))
    blocks_s = predict_step(deeper, H100).parts, predict_step(made, H100).parts
    added = sum(blocks_s[0][part] - blocks_s[1][part] for part in ("products", "memory-bound ops"))
    twice = replace(H100, blocks=(MeasuredBlock(*block_shape(made), 2.0, ()),))
    assert predict_step(made, twice).seconds - predict_step(made, H100).seconds == pytest.approx(added, rel=1e-6)
    assert predict_step(config(microbatch=4), twice) == predict_step(config(microbatch=4), H100)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"pp": 2, "dp": 2}, {"recompute": "full"}], ids=str)
def test_planted_factors_are_found(layout: dict[str, int | str]) -> None:
    made = config(**layout)  # type: ignore[arg-type]
    for factor in (0.6, 1.0, 1.7):
        planted = replace(H100, blocks=(MeasuredBlock(*block_shape(made), factor, ()),))
        steps = [run(made, predict_step(made, planted).seconds)]
        learned = with_measured_blocks(H100, steps)
        (block,) = learned.blocks
        assert block.factor == pytest.approx(factor, abs=2e-4) and block.rows == ("aa",)
        (row,) = compare(steps, learned)
        assert row.fitted and abs(row.error) < 1e-3 and not compare(steps, H100)[0].fitted


def test_the_median_of_a_shape_counts_and_other_shapes_stay() -> None:
    made, other = config(), config(tp=2)
    seconds = predict_step(made, H100).seconds
    known = MeasuredBlock(*block_shape(other), 1.5, ("old",))
    steps = [run(made, share * seconds, str(share)) for share in (0.9, 1.1, 3.0)]
    learned = with_measured_blocks(replace(H100, blocks=(known,)), steps)
    middle = with_measured_blocks(H100, steps[1:2]).blocks[0]
    found = {block.shape: block for block in learned.blocks}
    assert found[block_shape(other)] == known
    assert found[block_shape(made)] == replace(middle, rows=("0.9", "1.1", "3.0"))


def test_a_step_of_another_machine_is_refused() -> None:
    seconds = predict_step(config(), H100).seconds
    for share in (0.2, 5.0):
        with pytest.raises(InputError, match="not a step of h100-80gb under fused-megatron"):
            with_measured_blocks(H100, [run(config(), share * seconds)])


def run_folder(path: Path, made: TrainConfig, times: list[float]) -> Path:
    path.mkdir()
    (path / "config.toml").write_text(config_text(made))
    records = [{"step": step, "loss": 1.0, "step_s": seconds} for step, seconds in enumerate(times, 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_command_learns_from_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, other = config(dp=2), config(tp=2)
    output = tmp_path / "mine.toml"
    for number, (one, cluster) in enumerate(((made, "h100"), (other, str(output)))):
        seconds = 1.2 * predict_step(one, H100).seconds
        folder = run_folder(tmp_path / str(number), one, [9.0, seconds, seconds, 2 * seconds])
        arguments = CalibrateArguments(output=output, steps=folder, cluster=cluster)
        assert run_calibrate(arguments) == 0
        assert predict_step(one, load_cluster(output)).seconds == pytest.approx(seconds, rel=1e-3)
    assert len(load_cluster(output).blocks) == 2
    assert "16.7% by the constants, 0.0% with the factors" in capsys.readouterr().out
    assert replace(load_cluster(output), blocks=()) == H100


def test_ranks_of_a_run_without_a_data_parallel_size(tmp_path: Path) -> None:
    made = config(tp=2)
    made = replace(made, parallel=replace(made.parallel, data_parallel_size=None))
    folder = run_folder(tmp_path / "run", made, [9.0, 1.0])
    assert read_steps(folder)[0].config.parallel.data_parallel_size == 1
    assert read_steps(folder, 8)[0].config.parallel.data_parallel_size == 4


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", config(), [1.0, 1.0])
    short = run_folder(tmp_path / "short", config(), [1.0])
    (tmp_path / "empty").mkdir()
    rows = tmp_path / "rows.csv"
    rows.write_text("a,b\n1,2\n")
    good = CalibrateArguments(output=tmp_path / "c.toml", steps=folder, cluster="h100")
    for changes, message in (
        ({"cluster": None}, "cluster must be given with --steps"),
        ({"cluster": "z9"}, "cluster='z9' must be one of"),
        ({"steps": None}, "cluster and engine go with --steps"),
        ({"engine": "apex"}, "engine='apex'"),
        ({"device": "cpu"}, "device='cpu' does not go with --steps"),
        ({"ranks": 3}, "not a step of|must be divisible|ranks=3"),
        ({"steps": tmp_path / "absent"}, "steps=.*absent does not exist"),
        ({"steps": tmp_path / "empty"}, "must be a CSV file or the folder of a run"),
        ({"steps": short}, "two steps or more"),
        ({"steps": rows}, "steps=.*must be a CSV file with rows and the columns"),
        ({"steps": rows, "ranks": 2}, "ranks=2 does not go with steps="),
        ({"output": tmp_path}, "must be the name of a file"),
    ):
        with pytest.raises(InputError, match=message) as error:
            run_calibrate(replace(good, **changes))  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    assert not good.output.exists()
    assert "blocks" not in cluster_text(H100)
