"""Trackers that show a run's metrics in a browser: wandb and trackio, each a package of its own."""

import importlib
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fused_megatron.checks import InputError, first_line
from fused_megatron.optional_packages import install_command

PROJECT = "fused-megatron"


class Tracker:
    """A run of one tracker.

    A run is worth more than its tracker: an error of the tracker is printed once, and the rest of the run is not
    tracked.

    Args:
        name: of the tracker.
        send: takes one record of metrics.
        finish: ends the tracker's run.
    """

    def __init__(self, name: str, send: Callable[[dict[str, Any]], object], finish: Callable[[], object]) -> None:
        self.name = name
        self._send = send
        self._finish = finish
        self._failed = False

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of a record; `step` is their axis."""
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        self._try(lambda: self._send(numbers))

    def close(self) -> None:
        """Wait until everything is sent, or written to the disk."""
        self._try(self._finish)

    def _try(self, action: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            warnings.warn(
                f"{self.name} failed ({first_line(error)}); the run goes on without it", RuntimeWarning, stacklevel=3
            )


def open_trackers(names: Sequence[str], run: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Begin a run of each tracker, or go on with the run of this folder.

    Args:
        names: "wandb" or "trackio"; their own environment variables (WANDB_MODE=offline, TRACKIO_DIR) hold.
        run: the run folder; its name is the name of the run.
        config: settings to store with the run.

    Raises:
        InputError: a tracker is not installed, or it cannot begin (such as wandb without a key).
    """
    return [_OPENERS[name](_imported(name), run, config) for name in names]


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"training.trackers needs {name}: {install_command(name)}") from None


def _open_wandb(wandb: Any, run: Path, config: Mapping[str, Any]) -> Tracker:
    identity = run / "wandb_id"
    try:
        if not identity.exists():
            identity.write_text(secrets.token_hex(4), encoding="utf-8")
        began = wandb.init(
            project=PROJECT,
            name=run.name,
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run),
            config=dict(config),
        )
    except Exception as error:
        raise InputError(
            f"training.trackers=wandb cannot begin: {first_line(error)} (log in: wandb login; or without a network: "
            f"WANDB_MODE=offline)"
        ) from error
    # Our own axis: a run that resumes from a checkpoint does some steps again.
    began.define_metric("*", step_metric="step")
    return Tracker("wandb", began.log, began.finish)


def _open_trackio(trackio: Any, run: Path, config: Mapping[str, Any]) -> Tracker:
    try:
        # Measuring the GPU is left to it; the dashboard is opened by `trackio show`.
        trackio.init(project=PROJECT, name=run.name, config=dict(config), resume="allow", embed=False)
    except Exception as error:
        raise InputError(f"training.trackers=trackio cannot begin: {first_line(error)}") from error

    def send(numbers: dict[str, Any]) -> None:
        step = int(numbers.pop("step"))
        trackio.log(numbers, step=step)

    return Tracker("trackio", send, trackio.finish)


_OPENERS: dict[str, Callable[[Any, Path, Mapping[str, Any]], Tracker]] = {
    "wandb": _open_wandb,
    "trackio": _open_trackio,
}
