"""Start here when a layer takes long to reach its collective: number of files and calls on the way."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fused_megatron
from fused_megatron.tensor_parallel import ColumnParallelLinear
from fused_megatron.testing import run_on_ranks

PACKAGE = Path(fused_megatron.__file__).parent
MOST_FILES, MOST_CALLS = 7, 8


class PathToFirstByte:
    """Profile function that records the package's files and the depth of its calls until the first byte is sent.

    Through shared memory this is the message to the other ranks, over gloo the call of torch.distributed.
    """

    def __init__(self):
        self.files, self.depth, self.calls, self.sent_by = set(), 0, [], None

    def __call__(self, frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.parts[-2:] == ("distributed", "distributed_c10d.py"):
            self.sent_by = frame.f_code.co_name
        elif event == "c_call" and getattr(argument, "__name__", "") == "sendall":
            self.sent_by = argument.__name__
        if self.sent_by is not None:
            sys.setprofile(None)
        elif event in ("call", "return") and path.is_relative_to(PACKAGE):
            self.depth += 1 if event == "call" else -1
            if event == "call":
                self.files.add(path.relative_to(PACKAGE).as_posix())
                self.calls.append((self.depth, frame.f_code.co_name))


def paths_to_first_byte(rank, ranks, shared_memory):
    if not shared_memory:
        os.environ["FUSED_MEGATRON_SHARED_MEMORY"] = "off"
    paths = []
    for overlap in (True, False):
        layer = ColumnParallelLinear(16, 32, tp_group=dist.group.WORLD, sequence_parallel=True, overlap=overlap)
        x = torch.randn(8, 1, 16, requires_grad=True)
        layer(x)  # a first step chooses the chunks of this shape
        path = PathToFirstByte()
        sys.setprofile(path)
        layer.forward(x)
        sys.setprofile(None)
        paths.append((sorted(path.files), path.calls, path.sent_by))
    return paths


@pytest.mark.parametrize("shared_memory", [True, False])
def test_the_way_to_the_first_byte_is_short(shared_memory):
    for files, calls, sent_by in run_on_ranks(paths_to_first_byte, 2, shared_memory)[0]:
        assert sent_by == ("sendall" if shared_memory else "all_gather_single")
        assert calls[0] == (1, "forward") and "collectives/transfers.py" in files
        assert len(files) <= MOST_FILES, files
        assert max(depth for depth, _ in calls) <= MOST_CALLS, calls
