"""Settings for all tests, and the fixtures that rooms share."""

import contextlib
import ctypes
import os
import signal

# Inherited by the rank processes that tests start: several ranks on a few cores, one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A thread that waits for another sleeps: where workers and their ranks share a few cores, spinning takes them from
# those that have work (the tests of ops and models: 30 s instead of 48 s on two cores).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A shell's background job ignores Ctrl-C, nohup ignores the end of a terminal, and programs that they start inherit
# that: among these the programs to which tests send the signal. A handler is not inherited.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)

import pytest
import torch

from fused_megatron.testing.two_hosts import TwoHosts, missing

# Files that take longest: begun first, so that no worker is left with one of them at the end.
LONG = ("tests/audit/", "tests/training/", "tests/test_")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


# Two threads in the process of the tests itself, so that the kernels' threaded paths run.
torch.set_num_threads(2)


# linux/capability.h: the version of capget's header with two words a set, and root's rights to pass over permissions.
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2


@contextlib.contextmanager
def _without_roots_rights():
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice

    def call(function, sets):
        if function(header, sets):
            raise OSError(ctypes.get_errno(), "the rights of this thread cannot be read or set")

    call(libc.capget, held)
    fewer = (ctypes.c_uint32 * 6)(*held)
    fewer[0] &= ~(1 << _CAP_DAC_OVERRIDE | 1 << _CAP_DAC_READ_SEARCH)
    call(libc.capset, fewer)
    try:
        yield
    finally:
        call(libc.capset, held)


@pytest.fixture
def without_roots_rights():
    """A context in which permissions bind this thread, also where root runs the tests.

    The user stays the same: another user could not even enter a temporary folder that is closed to all but its owner.
    """
    return _without_roots_rights


@pytest.fixture(scope="module")
def two_hosts():
    """Two network namespaces joined by a cable, as `make faults` has them."""
    why = missing()
    if why:
        pytest.skip(why)
    with TwoHosts() as found:
        yield found
