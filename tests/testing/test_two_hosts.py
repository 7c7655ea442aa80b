"""Start here when two namespaces are left behind, or a process sees another network than its own."""

import os
import subprocess
import sys

import pytest

from fused_megatron.testing.two_hosts import TwoHosts, enter_host, missing

pytestmark = pytest.mark.skipif(missing(("ip", "tc")) is not None, reason=f"{missing(('ip', 'tc'))}")

COUNTED = """
import socket, sys
from fused_megatron.testing.two_hosts import enter_host, limit_device, sent_bytes
enter_host(sys.argv[1])
limit_device(80)
before = sent_bytes()
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.bind(("10.231.78.1", 0))
for _ in range(20):
    sender.sendto(bytes(1000), ("10.231.78.2", 9))
limit_device(None)
print(sent_bytes() - before)
"""


def names() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines()]


def test_a_process_enters_a_host_and_counts_what_it_sends() -> None:
    with TwoHosts() as hosts:
        hosts.limit(100)
        shown = subprocess.run(["tc", "-n", hosts.names[1], "qdisc"], capture_output=True, text=True, check=True).stdout
        assert "rate 100Mbit" in shown
        done = subprocess.run(
            [sys.executable, "-c", COUNTED, hosts.names[0]], capture_output=True, text=True, check=True
        )
    # 42 bytes of headers each; the search for the other's address comes on top.
    assert 20 * 1042 <= int(done.stdout) < 20 * 1042 + 2000
    assert not set(hosts.names) & set(names())


def test_namespaces_of_a_killed_process_are_removed_and_those_of_others_stay() -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, living = f"fm-{dead.pid}-0", f"fm-{os.getppid()}-1"
    for name in (left, living):
        subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        with TwoHosts():
            assert left not in names() and living in names()
    finally:
        for name in (left, living):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_a_host_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        enter_host("fm-none-0")
