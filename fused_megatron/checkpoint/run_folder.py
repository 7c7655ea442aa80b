"""The folder of a run: resolved config, metrics, picture, checkpoints."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from fused_megatron.checks import InputError
from fused_megatron.config import TrainConfig
from fused_megatron.config.config_file import save_config


class RunFolder:
    """Paths of a run and its metrics file, one JSON object a line.

    Args:
        path: the folder; made by create().
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.loss_picture = path / "loss.png"
        self.checkpoints = path / "checkpoints"
        self.tokenizer = path / "tokenizer.json"
        # What an imported model had beside its weights, for the way back.
        self.hugging_face = path / "hugging_face"
        self._tensorboard: Any = None

    def create(self) -> None:
        """Make the folder, and see that files can be written there."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.metrics.open("a").close()
        except OSError as error:
            raise InputError(
                f"training.run_folder={self.path} cannot be written: {error.strerror or error} (choose another)"
            ) from None

    def describe(self, config: TrainConfig, tokenizer_path: str | None) -> None:
        """Write the resolved config and a copy of the tokenizer, which `generate` reads."""
        save_config(config, self.config)
        if tokenizer_path is not None and Path(tokenizer_path).resolve() != self.tokenizer.resolve():
            shutil.copyfile(tokenizer_path, self.tokenizer)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add a line; it is on its way to the disk when this returns."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._tensorboard is not None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(name, value, record["step"])
            self._tensorboard.flush()

    def open_tensorboard(self, step: int) -> None:
        """Write metrics to tensorboard/ too, and hide what is there of steps beyond `step`."""
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra
        except ImportError:
            raise InputError(
                "training.tensorboard=True needs tensorboard: pip install 'fused-megatron[tensorboard]'"
            ) from None
        self._tensorboard = SummaryWriter(self.path / "tensorboard", purge_step=step + 1)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines; one that a kill cut short is left out."""
        if not self.metrics.exists():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps beyond `step`: they will be run again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        replacement = self.metrics.with_suffix(".jsonl.tmp")
        replacement.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(replacement, self.metrics)
