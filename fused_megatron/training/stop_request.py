"""Requests to save and end a run: a signal, or the end of the launcher that started the ranks."""

import os
import select
import signal
import threading
import time
from typing import Any

from fused_megatron.checks import SharedInputError
from fused_megatron.training.error_line import print_error, prints_for_host

LAUNCHER_VARIABLE = "FUSED_MEGATRON_LAUNCHER"
"""Variable in which our own launcher passes its process id."""
STOPPED_CODE_VARIABLE = "FUSED_MEGATRON_STOPPED_CODE"
"""Variable with the exit code of a run that was asked to end and has saved; by default 0, as of a run that is done."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
REASONS = (*(number.name for number in SIGNALS), "a closed output", "the end of its launcher")
"""Reasons to stop, in the order in which ranks exchange them."""

# A scheduler signals every process, and then the launcher signals its ranks again.
_SAME_SIGTERM_S = 10.0
# Both the terminal and the launcher signal every process.
_SAME_SIGINT_S = 1.0
_LOOK_S = 0.5


class StopRequest:
    """Watch for signals and for the end of the launcher, and remember whether this process was asked to stop.

    After begin(), SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask the run to save and end. A signal that was ignored before (as
    by nohup) stays ignored. A second SIGTERM within 10 s of the first, and a SIGINT within 1 s of the first request,
    count as the same request. A later SIGTERM or SIGINT ends the process at once; SIGHUP and SIGUSR1 never do.

    Ranks end with their launcher: at once before begin(), as by a signal after it. The launcher is known from our own
    variable or from torchrun's. Without these no process is watched, since a parent may end before its child.

    A thread notes when signals came, so that a second SIGINT also ends a process that waits in a collective.

    Attributes:
        asked: one of REASONS; None if no stop was requested.

    Raises:
        SharedInputError: STOPPED_CODE_VARIABLE is no exit code.
    """

    def __init__(self) -> None:
        code = os.environ.get(STOPPED_CODE_VARIABLE, "0")
        if not code.isdecimal() or len(code) > 3 or int(code) > 255:
            raise SharedInputError(f"{STOPPED_CODE_VARIABLE}={code:.40} must be an exit code, 0 to 255")
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

    @property
    def exit_code(self) -> int:
        """Exit code of a run that was asked to end and has saved."""
        return int(os.environ.get(STOPPED_CODE_VARIABLE, "0"))

    def begin(self) -> None:
        """Treat signals as requests from now on. Works only in the main thread; elsewhere signals stay as they are."""
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
        """Restore the signal handlers, or ignore the signals: for a process that has saved everything and ends now."""
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
        """Note a signal at time `now` in seconds; return whether it must end the process at once."""
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
    """End without waiting for anything; one rank of each machine prints the message."""
    if prints_for_host():
        print_error(message)
    os._exit(code)
