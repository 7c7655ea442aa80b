"""Start here when Nsight or a profile shows no ranges, or ranges that are not nested."""

from typing import Any

import pytest
import torch
from torch import nn

from fused_megatron.collectives import all_reduce_identity
from fused_megatron.observe.named_ranges import NamedRanges, ProfilerMarker
from fused_megatron.testing.run_on_ranks import run_on_ranks


class Recorder:
    """Marker that keeps the names, indented by their depth."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0

    def push(self, name: str) -> None:
        self.lines.append("  " * self.depth + name)
        self.depth += 1

    def pop(self) -> None:
        self.depth -= 1
        assert self.depth >= 0


class Layer(nn.Module):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.fails = fails

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise ValueError("a fault")
        return all_reduce_identity(self.inner(x), torch.distributed.group.WORLD)


def on_two_ranks(rank: int, world_size: int) -> list[str]:
    recorder = Recorder()
    model = nn.Sequential(Layer(), nn.ModuleList())[:1]
    ranges = NamedRanges({0: model}, recorder)
    with ranges.step(7), ranges.range("forward stage 0 microbatch 2"):
        model(torch.ones(2, 3))
    assert recorder.depth == 0
    ranges.close()
    model(torch.ones(2, 3))  # outside of a step, without hooks: no more lines
    return recorder.lines


def test_steps_actions_layers_and_collectives_are_nested() -> None:
    for lines in run_on_ranks(on_two_ranks, 2, timeout_s=60):
        assert lines[:4] == ["step 7", "  forward stage 0 microbatch 2", "    0", "      0.inner"]
        assert lines[4:] and all(line.startswith("      ") and line.endswith(" MB, 2 ranks") for line in lines[4:])


def test_an_error_leaves_no_range_open() -> None:
    recorder = Recorder()
    model = nn.Sequential(nn.Linear(3, 3), Layer(fails=True))
    ranges = NamedRanges({0: model}, recorder)
    with pytest.raises(ValueError, match="a fault"), ranges.step(1):
        model(torch.ones(2, 3))
    assert recorder.depth == 0 and recorder.lines == ["step 1", "  0", "  1"]


def test_the_profiler_has_the_ranges() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    ranges = NamedRanges({0: model}, ProfilerMarker())
    with torch.profiler.profile() as profiler, ranges.step(3):
        model(torch.ones(2, 3))
    names: list[Any] = [event.name for event in profiler.events()]
    assert {"step 3", "0"} <= {*names}
