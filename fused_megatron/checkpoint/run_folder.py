"""Folder of a run: resolved config, metrics, loss plot, tokenizer and checkpoints."""

import contextlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from fused_megatron.checks import InputError, check
from fused_megatron.config import TrainConfig
from fused_megatron.config.config_file import config_text
from fused_megatron.durable import replace_file
from fused_megatron.optional_packages import install_command
from fused_megatron.untrusted_files import convert, open_plain_file

CLOCK_FIELDS = ("time", "step_s", "tokens_per_s", "mfu", "peak_memory_bytes")
"""Fields of the metrics that differ between two runs with the same numbers."""


class _Record(msgspec.Struct):
    """Fields that are read from a line of metrics."""

    step: int
    loss: float = 0.0
    tokens_per_s: float = 0.0
    validation_loss: float = 0.0
    bits_per_byte: float | None = None


class RunFolder:
    """Paths of a run, and its metrics file with one JSON object a line.

    Args:
        path: the folder; create() makes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.loss_picture = path / "loss.png"
        # Predicted and measured timeline of a step, of a run with training.cluster.
        self.timelines = path / "timelines.json"
        self.checkpoints = path / "checkpoints"
        self.tokenizer = path / "tokenizer.json"
        self.lease = path / "lease.json"
        # Files of an imported model other than its weights, kept for its export.
        self.hugging_face = path / "hugging_face"
        # Recorded steps, of a run with training.profile_steps.
        self.profile = path / "profile"
        # Called with each record of metrics, on the rank that writes them.
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self._tensorboard: Any = None
        self._metrics_failed = False

    def check_exists(self) -> None:
        """Raise InputError unless this is the folder of a run; a folder inside a run is answered with the run."""
        if self.config.is_file():
            return
        runs = (each for each in self.path.parents if (each / self.config.name).is_file())
        inside = next((each for each in runs if (each / self.checkpoints.name).is_dir()), None)
        hint = "the folder that train writes, such as runs/my" if inside is None else f"{inside}, of which it is a part"
        raise InputError(f"run={self.path} is no run folder: it has no {self.config.name} (give {hint})")

    def create(self) -> None:
        """Make the folder, and check that files can be written there."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            os.close(open_plain_file(self.metrics, write=True))
        except OSError as error:
            raise InputError(
                f"training.run_folder={self.path} cannot be written: {error.strerror or error} (choose another)"
            ) from None

    def check_tokenizer(self, tokenizer_path: str | None, text: str) -> None:
        """Raise InputError if text of another tokenizer would go on this run, whose weights know the ids of its own.

        Args:
            tokenizer_path: of the text; None: token ids without a tokenizer.
            text: its name, for the message.
        """
        if tokenizer_path is None or not self.tokenizer.is_file():
            return
        check(
            Path(tokenizer_path).read_bytes() == self.tokenizer.read_bytes(),
            f"{text} has another tokenizer than {self.path}, whose weights know other ids "
            f"(data.tokenizer_path={self.tokenizer} keeps the run's; or choose another training.run_folder)",
        )

    def describe(self, config: TrainConfig, tokenizer_path: str | None) -> None:
        """Write the resolved config and a copy of the tokenizer for `generate`; equal files are not written again."""
        replace_file(self.config, config_text(config).encode())
        if tokenizer_path is not None and Path(tokenizer_path).resolve() != self.tokenizer.resolve():
            replace_file(self.tokenizer, Path(tokenizer_path).read_bytes())

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append a line; the operating system has it when this returns.

        A run is worth more than its metrics. If a line cannot be written (a full disk), it is left out with a warning;
        the next warning comes only after a line could be written again.
        """
        for listener in self.listeners:
            listener(record)
        try:
            self._append_line(json.dumps(record))
            if self._tensorboard is not None:
                for name, value in record.items():
                    if name != "step" and isinstance(value, int | float):
                        self._tensorboard.add_scalar(name, value, record["step"])
                self._tensorboard.flush()
        except OSError as error:
            if not self._metrics_failed:
                warnings.warn(
                    f"{self.metrics} cannot be written from step {record['step']} on: {error.strerror or error}; "
                    f"the run goes on",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._metrics_failed = True
        else:
            self._metrics_failed = False

    def _append_line(self, line: str) -> None:
        with self.metrics.open("a+b") as file:
            # The last line may be cut short by a full disk or a kill: begin a new line.
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(f"{line}\n".encode())

    def open_tensorboard(self, step: int) -> None:
        """Write metrics to tensorboard/ too, and hide earlier entries there for steps after `step`."""
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra
        except ImportError:
            raise InputError(f"training.tensorboard=True needs tensorboard: {install_command('tensorboard')}") from None
        self._tensorboard = SummaryWriter(self.path / "tensorboard", purge_step=step + 1)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all complete lines; a line that a kill cut short is left out."""
        if not self.metrics.exists():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # cut short, or from another program
                record = json.loads(line)
                convert(record, _Record)
                records.append(record)
        return records

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps after `step`, which will run again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        replace_file(self.metrics, "".join(json.dumps(record) + "\n" for record in kept).encode())
