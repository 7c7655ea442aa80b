"""Progress output of a run: a progress bar or log lines."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

# Characters of the bar and the columns beside the status: "step", "  100/2000", the bar, "ETA 0:00:00" and spaces.
_OTHER_COLUMNS = 76


@dataclass(frozen=True)
class StepFigures:
    """Figures of a step for the user.

    Attributes:
        loss: of the step, in nats per token.
        gradient_norm: before clipping.
        seconds: time of the step.
        tokens_per_s: median speed of the latest steps, over all ranks.
        eta_s: seconds to the end of the run.
        mfu: share of the speed of large matrix products; None if it is unknown.
        peak_memory_bytes: of rank 0 so far; 0 if it is unknown.
        more: text that follows the loss.
    """

    loss: float
    gradient_norm: float
    seconds: float
    tokens_per_s: float
    eta_s: float
    mfu: float | None = None
    peak_memory_bytes: int = 0
    more: str = ""

    def texts(self) -> list[str]:
        """Return the figures beside the loss, the most wanted first."""
        mfu = [] if self.mfu is None else [f"MFU {self.mfu:.1%}"]
        memory = [f"{self.peak_memory_bytes / 1e9:.1f} GB"] if self.peak_memory_bytes else []
        seconds = f"{self.seconds:.2f} s" if self.seconds >= 1 else f"{self.seconds * 1e3:.0f} ms"
        return [
            f"{self.tokens_per_s:,.0f} tokens/s",
            f"{seconds}/step",
            f"norm {self.gradient_norm:.2f}",
            *mfu,
            *memory,
        ]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError; rich would end the process."""
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output")


class Reporter:
    """Output of a run: a progress bar on a terminal, plain lines elsewhere, nothing on ranks other than 0.

    Attributes:
        is_closed: True once the pipe is closed or the terminal is gone; then nothing more is printed.
    """

    def __init__(self, enabled: bool, log_interval: int) -> None:
        # soft_wrap: a log line must stay one line.
        self.console = _Console(quiet=not enabled, soft_wrap=True, highlight=False)
        self.is_closed = False
        self._log_interval = log_interval
        self._progress: Progress | None = None
        self._num_steps = 0
        self._stage = ""
        self._held_out = ""

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with self._survives_its_output():
            self.console.print(text, markup=False)

    def stage(self, name: str, done: int, total: int) -> None:
        """Print the name of a preparation stage once, when it begins."""
        if name != self._stage:
            self._stage = name
            self.say(f"{name} ...")

    @contextmanager
    def steps(self, first: int, num_steps: int) -> Iterator[None]:
        """Show the loop over steps while the context is open."""
        self._num_steps = num_steps
        if not self.console.is_terminal:
            yield
            return
        progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}  ETA", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(),
            console=self.console,
        )
        with self._survives_its_output():
            progress.start()
        progress.add_task("train", total=num_steps, completed=first, status="")
        self._progress = progress
        try:
            yield
        finally:
            self._progress = None
            with self._survives_its_output():
                progress.stop()

    def step(self, step: int, figures: StepFigures) -> None:
        """Report that step `step` (1 for the first) is done."""
        if self._progress is not None:
            status = f"loss {figures.loss:.3f}{figures.more}{self._held_out}"
            room = self.console.width - _OTHER_COLUMNS - len(status)
            for text in figures.texts():  # as many as the terminal has room for
                room -= len(text) + 2
                if room < 0:
                    break
                status += f"  {text}"
            self._progress.update(self._progress.task_ids[0], completed=step, status=status)
        elif step % self._log_interval == 0 or step == self._num_steps:
            texts = "  ".join(
                (f"loss {figures.loss:.4f}{figures.more}", *figures.texts(), f"ETA {figures.eta_s:.0f} s")
            )
            self.say(f"step {step}/{self._num_steps}  {texts}")

    def held_out(self, loss: float) -> None:
        """Show the held-out loss on the bar from now on."""
        self._held_out = f" (held-out {loss:.3f})"

    def table(self, title: str, rows: dict[str, str]) -> None:
        """Print a table of names and values."""
        table = Table(title=title, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, value)
        with self._survives_its_output():
            self.console.print(table)

    @contextmanager
    def _survives_its_output(self) -> Iterator[None]:
        """Suppress errors of the output, since a run is worth more than its log; on a full disk lines are missing."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                self.is_closed = self.console.quiet = True
