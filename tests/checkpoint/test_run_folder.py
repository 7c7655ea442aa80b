"""Start here when metrics are lost by a kill or a resume, or a run's config does not come back equal."""

import dataclasses
import os
import warnings
from pathlib import Path

import pytest

from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import InputError
from fused_megatron.config import DataConfig, TrainConfig, TrainingConfig
from fused_megatron.config.config_file import config_text, load_config
from fused_megatron.training.loss_plot import plot_loss


def test_config_comes_back_equal(tmp_path: Path) -> None:
    config = TrainConfig(
        data=DataConfig(path='a "quoted" \\ path, -dash', validation_fraction=0.1), training=TrainingConfig(num_steps=7)
    )
    run = RunFolder(tmp_path / "run")
    run.create()
    run.describe(config, None)
    assert load_config(run.config) == config
    assert load_config(run.config, ["--training.num_steps", "9"]).training.num_steps == 9


def test_half_a_line_is_left_out_and_later_steps_forgotten(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    records = [{"step": step, "loss": 0.1 + step / 3} for step in range(1, 6)]
    for record in records:
        run.append_metrics(record)
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    assert run.read_metrics() == records
    run.forget_metrics_after(3)
    run.append_metrics({"step": 4, "loss": 1.0})
    assert run.read_metrics() == [*records[:3], {"step": 4, "loss": 1.0}]


def test_equal_files_are_left_alone_and_others_replaced_whole(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    config = TrainConfig()
    run.describe(config, str(tokenizer))
    before = [path.stat() for path in (run.config, run.tokenizer)]
    run.describe(config, str(tokenizer))
    after = [path.stat() for path in (run.config, run.tokenizer)]
    assert [(s.st_ino, s.st_mtime_ns) for s in before] == [(s.st_ino, s.st_mtime_ns) for s in after]
    with open(run.config, "rb") as reader:  # opened before the replacement: it still sees the whole old file
        run.describe(dataclasses.replace(config, training=TrainingConfig(num_steps=7)), str(tokenizer))
        assert reader.read() == config_text(config).encode()
    assert load_config(run.config).training.num_steps == 7
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoints",
        "config.toml",
        "metrics.jsonl",
        "tokenizer.json",
    ]


def test_metrics_that_cannot_be_written_end_no_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    run.append_metrics({"step": 1})
    with run.metrics.open("a") as file:
        file.write('{"step": 2, "lo')  # the disk was full half-way
    run.path.rename(tmp_path / "away")
    with pytest.warns(RuntimeWarning, match="cannot be written from step 3 on: No such file or directory; the run"):
        run.append_metrics({"step": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.append_metrics({"step": 4})
        (tmp_path / "away").rename(run.path)
        run.append_metrics({"step": 5})
    assert run.read_metrics() == [{"step": 1}, {"step": 5}]


def test_a_damaged_line_is_left_out(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_bytes(b'{"step": 1}\n\xff\xfe\n[3]\n{"loss": 2}\n{"step": 2}\n')
    run.forget_metrics_after(5)
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"training.run_folder=.*file/run cannot be written: Not a directory"):
        RunFolder(tmp_path / "file" / "run").create()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=r"training.run_folder=.* cannot be written: not a plain file"):
        RunFolder(tmp_path).create()


@pytest.mark.parametrize("records", [
    [], [{"step": 1, "loss": 9.0}], [{"step": 1, "loss": 9.0}, {"step": 1, "validation_loss": 8.0}],
], ids=["none", "one", "both"])  # fmt: skip
def test_picture(tmp_path: Path, records: list[dict[str, float]]) -> None:
    assert plot_loss(records, tmp_path / "loss.png", "title")
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_tensorboard_events_and_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415 - slow

    for first, step in ((1, 0), (3, 2)):
        run = RunFolder(tmp_path)
        run.open_tensorboard(step)
        for i in range(first, 5):
            run.append_metrics({"step": i, "loss": 10.0 * first + i, "bits_per_byte": None})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert {e.step: e.value for e in events.Scalars("loss")} == {1: 11.0, 2: 12.0, 3: 33.0, 4: 34.0}
