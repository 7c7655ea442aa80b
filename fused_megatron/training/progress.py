"""Progress output of a run: a progress bar or log lines."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


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
            TextColumn("{task.fields[status]}  ETA"),
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

    def step(self, step: int, loss: float, tokens_per_s: float, eta_s: float, more: str = "") -> None:
        """Report that step `step` (1 for the first) is done; `more` follows the loss."""
        if self._progress is not None:
            status = f"loss {loss:.3f}{more}  {tokens_per_s:,.0f} tokens/s"
            self._progress.update(self._progress.task_ids[0], completed=step, status=status)
        elif step % self._log_interval == 0 or step == self._num_steps:
            speed = f"{tokens_per_s:,.0f} tokens/s  ETA {eta_s:.0f} s"
            self.say(f"step {step}/{self._num_steps}  loss {loss:.4f}{more}  {speed}")

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
