"""Start here when a signal kills a run that could have saved, or a second signal does not end it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fused_megatron.checks import InputError
from fused_megatron.training.stop_request import LAUNCHER_VARIABLE, REASONS, STOPPED_CODE_VARIABLE, StopRequest


@pytest.mark.parametrize(
    ("came", "ends"),
    [
        (["SIGTERM 0", "SIGTERM 0.1", "SIGTERM 9"], [False, False, False]),
        (["SIGTERM 0", "SIGTERM 11"], [False, True]),
        (["SIGUSR1 0", "SIGTERM 60", "SIGTERM 61"], [False, False, False]),  # a scheduler's warning, then its limit
        (["SIGINT 0", "SIGINT 0.9", "SIGINT 1.1"], [False, False, True]),
        (["SIGTERM 0", "SIGINT 0.5", "SIGINT 3"], [False, False, True]),
        (["SIGHUP 0", "SIGHUP 50", "SIGUSR1 60", "SIGUSR1 99"], [False] * 4),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value[0], str) else "",
)
def test_which_signals_are_one_request(came: list[str], ends: list[bool]) -> None:
    stop = StopRequest()
    found = []
    for each in came:
        name, seconds = each.split()
        found.append(stop.ends_at_once(signal.Signals[name], 100 + float(seconds)))
    assert found == ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_a_request_until_the_end(number: signal.Signals) -> None:
    here = signal.signal(number, signal.default_int_handler)  # nohup ignores SIGHUP
    try:
        stop = StopRequest()
        stop.begin()
        assert stop.asked is None
        os.kill(os.getpid(), number)
        assert stop.asked == number.name
        os.kill(os.getpid(), number)
        stop.end()
        assert signal.getsignal(number) is signal.default_int_handler
        assert number.name in REASONS
    finally:
        signal.signal(number, here)


def test_what_was_ignored_still_is() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        stop = StopRequest()
        stop.begin()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked is None
        stop.end()
    finally:
        signal.signal(signal.SIGHUP, before)


# A launcher that starts a rank and is killed: the rank prints how it ended.
RANK = """
import sys, time
from fused_megatron.training.stop_request import StopRequest
stop = StopRequest()
if sys.argv[1] == "begun":
    stop.begin()
print("ready", flush=True)
while stop.asked is None:
    time.sleep(0.01)
print(stop.asked, flush=True)
"""
LAUNCHER = f"""
import os, subprocess, sys, time
environment = {{**os.environ, {LAUNCHER_VARIABLE!r}: str(os.getpid())}}
subprocess.Popen([sys.executable, "-c", {RANK!r}, sys.argv[1]], env=environment)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ("begun", "the end of its launcher"),
        ("before", "the launcher of this rank is gone"),
    ],
)
def test_ranks_end_with_their_launcher(when: str, said: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, when], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()
        assert said in launcher.stdout.read()  # read to the end: the rank has closed it, too


@pytest.mark.slow  # the rank waits for a second; test_which_signals_are_one_request tests the rule
def test_a_process_that_never_looks_ends_at_the_second_interrupt() -> None:
    code = RANK.replace("while stop.asked is None:", "while True:")
    with subprocess.Popen(
        [sys.executable, "-c", code, "begun"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        time.sleep(1.3)
        process.send_signal(signal.SIGINT)
        assert "ended by SIGINT; the same command resumes" in process.stderr.read()
    assert process.returncode == 130


def test_the_exit_code_of_a_run_that_was_asked_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert StopRequest().exit_code == 0
    monkeypatch.setenv(STOPPED_CODE_VARIABLE, "75")
    assert StopRequest().exit_code == 75
    for code in ("-1", "256", "x", ""):
        monkeypatch.setenv(STOPPED_CODE_VARIABLE, code)
        with pytest.raises(InputError, match=f"{STOPPED_CODE_VARIABLE}={code} must be an exit code, 0 to 255"):
            StopRequest()
