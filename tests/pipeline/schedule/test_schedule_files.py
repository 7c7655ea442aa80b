"""Start here when a schedule in CSV or JSON, ours or torch's, is written or read as another schedule."""

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from fused_megatron.checks import InputError
from fused_megatron.pipeline import SCHEDULES, build_schedule, lower, schedule_findings
from fused_megatron.pipeline.schedule.schedule_files import from_csv, from_json, to_csv, to_json, to_torch_csv

SYNCHRONOUS = [name for name, kind in SCHEDULES.items() if kind.weights == "synchronous"]


def built(name: str, **options):
    return build_schedule(name, 4, 9, num_steps=1 if name in SYNCHRONOUS else 2, **options)


@pytest.mark.parametrize("name", SCHEDULES)
def test_round_trips(name: str) -> None:
    schedule = built(name, tied=((0, 3),) if name in SYNCHRONOUS else ())
    for given in (schedule, lower(schedule)):
        assert from_json(to_json(given)) == given
        again = from_csv(to_csv(given), tied=given.tied)
        assert (again.actions, again.placement, again.lowered) == (given.actions, given.placement, given.lowered)


def torch_grid(text: str) -> dict:
    """Return the rows as torch reads them."""
    return {r: [torch_schedules._Action.from_str(c) for c in row.split(",")] for r, row in enumerate(text.splitlines())}


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_torch_reads_what_we_write(name: str) -> None:
    schedule = built(name)
    grid = torch_grid(to_torch_csv(schedule))
    assert [list(map(str, row)) for row in grid.values()] == [list(map(str, row)) for row in schedule.actions]
    owners = torch_schedules._validate_schedule(grid, 4, schedule.num_stages, 9)
    assert [owners[stage] for stage in range(schedule.num_stages)] == list(schedule.placement)
    # torch's own lowering passes, and ours, finish in torch's simulation (which knows no reductions).
    lowered = torch_schedules._add_send_recv(grid, lambda stage: owners[stage], schedule.num_stages)
    torch_schedules._simulate_comms_compute(lowered, lambda stage: owners[stage], schedule.num_stages)
    ours = torch_grid(to_torch_csv(lower(schedule)))
    without = {rank: [a for a in row if a.computation_type.value != "REDUCE_GRAD"] for rank, row in ours.items()}
    torch_schedules._simulate_comms_compute(without, lambda stage: owners[stage], schedule.num_stages)


class Stage:
    """Stage with the attributes that torch's schedules read when they are made."""

    is_first = is_last = has_backward = False
    device = None

    def __init__(self, index: int, num_stages: int, ranks: int) -> None:
        self.stage_index, self.num_stages, self.group_size = index, num_stages, ranks
        self.group_rank, self.group, self.submod = 0, None, None


@pytest.mark.parametrize(("ours", "theirs", "per_rank"), [
    ("interleaved_1f1b", "ScheduleInterleaved1F1B", 2),
    ("interleaved_zero_bubble", "ScheduleInterleavedZeroBubble", 2),
    ("zb_v", "ScheduleZBVZeroBubble", 2),
    ("dual_pipe_v", "ScheduleDualPipeV", 2),
    ("looped_breadth_first", "ScheduleLoopedBFS", 2),
])  # fmt: skip
def test_we_read_what_torch_writes(ours: str, theirs: str, per_rank: int) -> None:
    stages = [Stage(index, 4 * per_rank, 4) for index in range(per_rank)]
    theirs_made = getattr(torch_schedules, theirs)(stages, 8, loss_fn=None)
    text = "\n".join(",".join("" if a is None else str(a) for a in row) for row in theirs_made.pipeline_order.values())
    imported, schedule = from_csv(text), build_schedule(ours, 4, 8, per_rank)
    assert imported.placement == schedule.placement and imported.num_microbatches == 8
    assert sorted(imported.actions[0]) == sorted(schedule.actions[0]) or ours == "dual_pipe_v"
    if ours == "looped_breadth_first":
        # torch's schedule runs its backwards in descending order, so that its sums differ from the other schedules'.
        assert {finding.rule for finding in schedule_findings(imported)} == {"ascending"}
    else:
        assert schedule_findings(imported) == [] and schedule_findings(lower(imported)) == []
    if ours in ("zb_v", "interleaved_1f1b"):
        assert imported.actions == schedule.actions


@pytest.mark.parametrize(("text", "message"), [
    ("", "there is no action in it"),
    ("0F0,nonsense", "row 0, cell 1: action='nonsense' must be a stage, a kind"),
    ("0F0,0B", "row 0, cell 1: action='0B' must be"),
    ("0F0,0B0\n0F1,0B1", "stage 0 has F on rank 0 and on rank 1"),
    ("1F0,1B0", "stage 0 has no F"),
])  # fmt: skip
def test_bad_csv(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        from_csv(text)
    assert message in str(error.value)


@pytest.mark.parametrize(("old", "new", "message"), [
    ("{", "[", "the JSON of a schedule was expected"),
    ('"name"', '"nome"', "the JSON of a schedule was expected"),
    ("0F0", "0X0", "action='0X0' must be"),
    ("[0, 1]", "[0, 2]", "placement=(0, 2) must give every rank"),
    ("[0, 1]", "[0, 1, 2]", "placement names 3 ranks, and actions has 2 rows"),
])  # fmt: skip
def test_bad_json(old: str, new: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        from_json(to_json(build_schedule("1f1b", 2, 2)).replace(old, new, 1))
    assert message in str(error.value)


def test_what_torch_cannot_hold_is_refused() -> None:
    with pytest.raises(InputError, match="has no updates within a schedule"):
        to_torch_csv(built("pipedream"))
    with pytest.raises(InputError, match="it is lowered already"):
        lower(lower(built("1f1b")))
    with pytest.raises(InputError, match="rank 0, position 0, rule complete: 0F0 is missing"):
        lower(from_csv("0B0,0F1,0B1"))
