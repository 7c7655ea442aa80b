"""Settings for all tests."""

import os
import signal

# Inherited by the rank processes that tests start: several ranks on a few cores, one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A thread that waits for another sleeps: where workers and their ranks share a few cores, spinning takes them from
# those that have work (the tests of ops and models: 30 s instead of 48 s on two cores).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A shell's background job ignores Ctrl-C, and so does whatever it starts: among it programs that tests send one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

# Files that take longest: begun first, so that no worker is left with one of them at the end.
LONG = ("tests/audit/", "tests/training/", "tests/test_")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


# Two threads in the process of the tests itself, so that the kernels' threaded paths run.
torch.set_num_threads(2)
