"""Start here when collectives use the wrong transport (gloo or shared memory), or tools do not see them."""

import logging
import os
import tempfile

import torch
import torch.distributed as dist

from fused_megatron.collectives import is_shared, meet
from fused_megatron.collectives.transfers import start_all_gather, start_all_reduce_
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.testing import run_on_ranks


def told(rank, ranks):
    group, x = dist.group.WORLD, torch.ones(6)
    with record_communication() as ledger:
        start_all_reduce_(x, group).wait()
        start_all_gather(x, 0, group).wait()
    entries = [(entry.kind, entry.elements, entry.num_bytes, entry.group) for entry in ledger.entries]
    # If one rank does not want shared memory, no rank uses it. A tool that replaces torch's function gets the calls.
    records, refused = [], dist.new_group()
    os.environ["FUSED_MEGATRON_SHARED_MEMORY"] = "off" if rank == 1 else "on"
    logger = logging.getLogger("fused_megatron.collectives.transport.select")
    logger.setLevel(logging.INFO)
    logger.addHandler(type("Handler", (logging.Handler,), {"emit": lambda self, r: records.append(r.getMessage())})())
    meet(refused)
    assert not is_shared(refused, x)
    assert start_all_reduce_(torch.ones(2), refused).wait().tolist() == [2.0, 2.0]
    calls, original = [], dist.all_reduce
    dist.all_reduce = lambda *a, **k: calls.append(a) or original(*a, **k)
    assert start_all_reduce_(torch.ones(2), group).wait().tolist() == [2.0, 2.0] and len(calls) == 1
    return entries, records


def test_tools_and_the_log_see_every_collective():
    for entries, records in run_on_ranks(told, 2):
        assert entries == [("all_reduce", 6, 24, (0, 1)), ("all_gather", 12, 48, (0, 1))]
        assert records == ["2 ranks of one group: collectives over gloo"]


def uninvited(rank, ranks):
    """Call is_shared on one rank only: it does not communicate."""
    group = dist.new_group()
    asked = is_shared(group, torch.empty(0)) if rank == 0 else None
    start_all_reduce_(torch.ones(2), group).wait()  # the ranks meet with their first collective
    return asked, is_shared(group, torch.empty(0))


def test_is_shared_does_not_communicate():
    assert run_on_ranks(uninvited, 2) == [(False, True), (None, True)]


def without_temporary_folder(rank, ranks):
    """Take the folder from one rank."""
    tempfile.tempdir = "/nowhere/at/all" if rank == 1 else None
    try:
        group = dist.new_group()
        meet(group)
        return is_shared(group, torch.empty(0)), start_all_reduce_(torch.ones(2), group).wait().tolist()
    finally:
        tempfile.tempdir = None


def test_gloo_is_used_without_a_folder_for_temporary_files():
    assert run_on_ranks(without_temporary_folder, 2) == [(False, [2.0, 2.0])] * 2
