"""Start here when wandb or trackio shows other figures than metrics.jsonl, or ends a run."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from fused_megatron.checks import InputError
from fused_megatron.training.trackers import Tracker, open_trackers
from fused_megatron.training.train import train


def trained(runs: Any, run: Path, **changes: Any) -> list[dict[str, Any]]:
    config = runs.config(run, async_checkpoint=False, replica_check_interval=0, **changes)
    train(config, run)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_trackio_has_the_metrics_also_of_a_resumed_run(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage  # noqa: PLC0415 (optional)

    run = tmp_path / "my-run"
    trained(runs, run, num_steps=2, trackers=("trackio",))
    records = trained(runs, run, num_steps=4, trackers=("trackio",))
    logs = SQLiteStorage.get_logs("fused-megatron", "my-run")
    for name in ("loss", "gradient_norm", "tokens_per_s", "validation_loss"):
        wanted = [(record["step"], record[name]) for record in records if name in record]
        assert sorted((log["step"], log[name]) for log in logs if name in log) == wanted


def wandb_records(content: bytes) -> list[bytes]:
    """Return the records of an offline run: LevelDB's log format, behind a header of 7 bytes."""
    block_bytes, at, records, parts = 1 << 15, 7, [], b""
    while at + 7 <= len(content):
        if block_bytes - at % block_bytes < 7:  # the end of a block is padding
            at += block_bytes - at % block_bytes
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(parts)
            parts = b""
    return records


def test_wandb_offline_has_the_metrics(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415 (optional)

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    records = trained(runs, tmp_path / "run", num_steps=2, trackers=("wandb",))
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    found: list[dict[str, Any]] = []
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    for name in ("loss", "validation_loss"):
        wanted = [(record["step"], record[name]) for record in records if name in record]
        assert [(each["step"], each[name]) for each in found if name in each] == wanted


def test_an_error_of_a_tracker_is_said_once_and_ends_nothing() -> None:
    sent: list[dict[str, Any]] = []

    def send(record: dict[str, Any]) -> None:
        sent.append(record)
        raise ConnectionError("the network is gone")

    tracker = Tracker("wandb", send, lambda: None)
    with pytest.warns(RuntimeWarning, match=r"wandb failed \(ConnectionError: the network is gone\); the run g") as w:
        for step in range(3):
            tracker({"step": step, "loss": 2.0, "time": "2026-11-30T18:05:00.123Z", "bits_per_byte": None})
        tracker.close()
    assert sent == [{"step": 0, "loss": 2.0}] and len(w) == 1


def test_a_tracker_that_cannot_begin_ends_the_command_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(InputError, match=r"trackers=wandb cannot begin: UsageError: api_key not configured \(log in: "):
        open_trackers(["wandb"], tmp_path, {})
