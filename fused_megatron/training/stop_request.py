"""Requests to save and end a run: a signal, or the end of the launcher that started its ranks."""

import os
import select
import signal
import threading
import time
from typing import Any

from fused_megatron.training.error_line import say_error, speaks_for_host

LAUNCHER_VARIABLE = "FUSED_MEGATRON_LAUNCHER"
"""Set by our own launcher: its process id."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
REASONS = (*(number.name for number in SIGNALS), "a closed output", "the end of its launcher")
"""What may have asked, in the order in which ranks tell each other."""

# A scheduler signals every process, and then the launcher signals its ranks once more.
_SAME_SIGTERM_S = 10.0
# The terminal signals every process of the foreground, and so does a launcher.
_SAME_SIGINT_S = 1.0
_LOOK_S = 0.5


class StopRequest:
    """Whether this process was asked to stop.

    From begin() on SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask the run to save and end; those that were ignored before (as
    by nohup) still are. A second SIGTERM within 10 s of the first, and a SIGINT within 1 s of whatever asked first, are
    the same request; a later one of these ends the process at once. SIGHUP and SIGUSR1 never do.

    Ranks that a launcher started end with it: before begin() at once, later as by a signal. The launcher is known by
    its own variable, or by torchrun's; without these nobody is watched, since a parent may leave before its program.

    A thread reads when signals came, so that a second SIGINT ends a process that waits within a collective, too.

    Attributes:
        asked: one of REASONS; None while nothing has asked.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._times: dict[int, float] = {}
        self._began = False
        self._ended = False
        self._previous: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._previous_pipe = -1
        launcher = os.environ.get(LAUNCHER_VARIABLE, "")
        started_by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self._launcher = int(launcher) if launcher.isdigit() else os.getppid() if started_by_torchrun else None
        self._thread = threading.Thread(target=self._watch, daemon=True, name="stop-request")
        if self._launcher is not None:
            self._thread.start()

    def begin(self) -> None:
        """From now on a signal is a request. Only a process's main thread can; elsewhere signals stay as they are."""
        self._began = True
        if threading.current_thread() is not threading.main_thread():
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._previous_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._ask)
        if not self._thread.is_alive():
            self._thread.start()

    def end(self, *, ignore: bool = False) -> None:
        """Give the signals back, or ignore them: a process that has saved all and is about to end."""
        self._ended = True
        for number, previous in self._previous.items():
            signal.signal(number, signal.SIG_IGN if ignore else previous)
        self._previous.clear()
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_pipe)
            os.write(self._pipe[1], b"\0")
        if self._thread.is_alive():
            self._thread.join()
        for descriptor in self._pipe or ():
            os.close(descriptor)
        self._pipe = None

    def ends_at_once(self, number: int, now: float) -> bool:
        """Note a signal that came at a time, in seconds; whether it asks for the end of the process."""
        first = self._times.setdefault(number, now)
        if number == signal.SIGTERM:
            return now - first > _SAME_SIGTERM_S
        return number == signal.SIGINT and now - min(self._times.values()) > _SAME_SIGINT_S

    def _watch(self) -> None:
        while not self._ended:
            readable = [] if self._pipe is None else [self._pipe[0]]
            ready, _, _ = select.select(readable, [], [], _LOOK_S)
            for number in os.read(ready[0], 64) if ready else b"":
                if number in SIGNALS and self.ends_at_once(number, time.monotonic()):
                    name = signal.Signals(number).name
                    _end_now(f"ended by {name}; the same command resumes from the newest checkpoint", 128 + number)
            if self._launcher is not None and os.getppid() != self._launcher:
                self._launcher = None
                if not self._began:
                    _end_now("the launcher of this rank is gone; the same command begins again", 1)
                self.asked = self.asked or REASONS[-1]

    def _ask(self, number: int, _: object) -> None:
        self.asked = self.asked or signal.Signals(number).name


def _end_now(message: str, code: int) -> None:
    """Without waiting for anything. One rank of a machine says why."""
    if speaks_for_host():
        say_error(message)
    os._exit(code)
