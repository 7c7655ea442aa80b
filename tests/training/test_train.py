"""Start here when a run trains on damaged tokens, writes into another run's folder, or differs with CUDA graphs."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest
import torch

from fused_megatron.benchmarking.report.command import ReportArguments, run_report
from fused_megatron.checkpoint import CheckpointError
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import InputError, SharedInputError
from fused_megatron.config import DataConfig, GPTConfig, TrainConfig, TrainingConfig
from fused_megatron.data import corpus, token_digest
from fused_megatron.models.stack import TransformerStack
from fused_megatron.testing.recorded_graphs import recorded_graphs
from fused_megatron.training import train as train_module
from fused_megatron.training.run_folder_lease import Lease
from fused_megatron.training.stop_request import StopRequest
from fused_megatron.training.train import train


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("the quick brown fox jumps over the lazy dog " * 9 for _ in range(40)))
    return TrainConfig(
        GPTConfig(num_layers=1, hidden_size=16, num_heads=2, seq_len=16),
        data=DataConfig(path=str(text), cache_folder=str(tmp_path / "cache"), tokenizer_vocab_size=270),
        training=TrainingConfig(num_steps=1, global_batch_size=4, microbatch_size=2, eval_batches=1),
    )


def test_tokens_that_are_damaged(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config, tmp_path / "run")
    (tokens,) = (tmp_path / "cache").glob("text-*/train.bin")
    good = tokens.read_bytes()
    tokens.write_bytes(good[:-1] + bytes([good[-1] ^ 64]))
    with pytest.warns(RuntimeWarning, match="cached data is damaged and built again: .*train.bin: the checksum of"):
        train(config, tmp_path / "again")
    assert tokens.read_bytes() == good
    # As for a file that is too large to be read before the run begins.
    for module in (corpus, token_digest):
        monkeypatch.setattr(module, "SMALL_BYTES", 0)
    tokens.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    long = dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=100_000))
    with pytest.raises(SharedInputError, match=r"step \d+ on rank 0: .*train\.bin: the checksum of bytes 0 to"):
        train(long, tmp_path / "other")


def test_a_run_whose_folder_was_taken_saves_nothing_more(config: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def take() -> None:
        while not (run / "checkpoints" / "step-000001").exists():
            waiting.wait(0.01)
        (run / "lease.json").write_text(json.dumps({"run": "5eed", "host": "elsewhere", "pid": 77}))

    waiting = threading.Event()
    other = threading.Thread(target=take)
    other.start()
    training = dataclasses.replace(config.training, num_steps=100_000, checkpoint_interval=1, keep_checkpoints=100_000)
    with pytest.raises(
        CheckpointError, match=r"was taken by (run 5eed \(process 77 on elsewhere\)|another run) while this run"
    ):
        train(dataclasses.replace(config, training=training), run)
    other.join()
    assert json.loads((run / "lease.json").read_text())["run"] == "5eed"


def test_a_second_run_in_the_folder_changes_nothing(config: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config, run)
    assert not (run / "lease.json").exists()
    first = Lease(run / "lease.json")
    first.take(print)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="is in use by run"):
        train(config, run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert json.loads((run / "lease.json").read_text())["run"] == first._ours["run"]
    first.give_back()


def test_a_run_beside_its_prediction(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(cluster: str | None, name: str) -> None:
        training = dataclasses.replace(config.training, cluster=cluster, num_steps=4, eval_interval=9)
        train(dataclasses.replace(config, training=training), tmp_path / name)

    logged = ["step", "loss", "gradient_norm", "lr", "tokens_per_s", "step_s", "mfu", "peak_memory_bytes", "time"]
    columns = ["predicted_s", "prediction_error"]
    for cluster, wanted in ((None, logged), ("h100", [*logged, *columns])):
        folder = tmp_path / str(cluster)
        run(cluster, folder.name)
        records = [record for record in RunFolder(folder).read_metrics() if "loss" in record]
        assert [list(record) for record in records] == [wanted] * 4
        predicts = cluster is not None
        assert (folder / "timelines.json").exists() == predicts
        printed = capsys.readouterr().out
        assert ("predicted for h100-80gb: " in printed) == ("median error" in printed) == predicts
    for record in records:
        assert record["prediction_error"] == record["predicted_s"] / record["step_s"] - 1
    with pytest.raises(SharedInputError, match=r"cluster='a99' must be one of a100"):
        run("a99", "unknown")
    assert run_report(ReportArguments((folder,))) == 0
    page = capsys.readouterr().out
    assert "# h100: predicted beside measured" in page and "| 4 " in page
    picture = (folder / "timelines.svg").read_text()
    assert "predicted: " in picture and "measured: " in picture
    # Two microbatches in each timeline.
    assert picture.count("<title>0F") == picture.count("<title>0B") == 4
    with pytest.raises(InputError, match="has no step with a prediction"):
        run_report(ReportArguments((tmp_path / "None",)))


@pytest.mark.parametrize("eval_interval", [2, 1_000_000], ids=["evaluations", "a stop only"])
def test_the_picture_is_drawn_at_each_evaluation_and_when_the_run_is_stopped(
    config: TrainConfig, tmp_path: Path, eval_interval: int
) -> None:
    pytest.importorskip("matplotlib")
    run, waiting, stop = RunFolder(tmp_path / "run"), threading.Event(), StopRequest()

    def watch() -> None:
        for _ in range(2):
            # A picture that was removed comes back while the run goes on; or, without evaluations, a step is done.
            seen = run.loss_picture if eval_interval == 2 else run.metrics
            while not (seen.exists() and seen.stat().st_size):
                waiting.wait(0.01)
            run.loss_picture.unlink(missing_ok=True)
        stop.asked = "SIGTERM"

    other = threading.Thread(target=watch)
    other.start()
    training = dataclasses.replace(config.training, num_steps=100_000, eval_interval=eval_interval)
    assert not train(dataclasses.replace(config, training=training), run.path, stop)
    other.join()
    stop.end()
    assert run.loss_picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_with_captured_blocks_has_the_same_metrics(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded graphs stand for CUDA graphs: also over evaluations, a checkpoint and a resume."""

    def losses(cuda_graphs: str) -> list[tuple[float | None, ...]]:
        for num_steps in (3, 5):
            changes = {"num_steps": num_steps, "eval_interval": 2, "cuda_graphs": cuda_graphs}
            training = dataclasses.replace(config.training, **changes)
            train(dataclasses.replace(config, training=training), tmp_path / cuda_graphs)
        records = RunFolder(tmp_path / cuda_graphs).read_metrics()
        return [tuple(map(record.get, ("step", "loss", "gradient_norm", "validation_loss"))) for record in records]

    captured: list[int] = []

    def capture_blocks(stack: TransformerStack, microbatch_size: int) -> None:
        captured.append(len(stack.blocks))
        capture(stack, microbatch_size, torch.cuda.make_graphed_callables)

    capture = train_module.capture_blocks
    monkeypatch.setattr(train_module, "capture_blocks", capture_blocks)
    monkeypatch.setattr(train_module, "check_graph_device", lambda device: None)
    with recorded_graphs():
        assert losses("block") == losses("off") and captured == [1, 1]
