"""Start here when ranks that srun or mpirun started do not find each other, or each trains a run of its own."""

import pytest

from fused_megatron.checks import SharedInputError
from fused_megatron.training.scheduler import set_rank_variables

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "8",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-here-5@1",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "3"}


def places(environment: dict[str, str]) -> list[str]:
    found = dict(environment)
    set_rank_variables(found)
    assert found["MASTER_ADDR"] == "127.0.0.1" and 20000 <= int(found["MASTER_PORT"]) < 30000
    return [found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]


def test_places_of_every_launcher() -> None:
    assert places(SLURM) == ["3", "8", "3", "8"]
    assert places(OPEN_MPI) == ["1", "4", "1", "4"]
    assert places(HYDRA) == ["2", "3", "2", "3"]


def test_several_machines_need_a_place_to_meet() -> None:
    two_machines = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_PROCID": "7"}
    with pytest.raises(SharedInputError, match=r"srun started 8 ranks on several machines.* set MASTER_ADDR"):
        set_rank_variables(dict(two_machines))
    found = two_machines | {"MASTER_ADDR": "node1"}
    set_rank_variables(found)
    assert (found["RANK"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("7", "3", "4")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_PROCID")},  # a batch script
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        SLURM | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},  # torchrun below srun
    ],
)
def test_other_processes_stay_as_they_are(environment: dict[str, str]) -> None:
    found = dict(environment)
    set_rank_variables(found)
    assert found == environment


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 without MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 and WORLD_SIZE=2 must be whole numbers"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE=two"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x and LOCAL_WORLD_SIZE=1 must be whole numbers"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "abc"}, "MASTER_PORT=abc must be a port"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "MASTER_PORT=99999 must be"),
    ],
)
def test_half_an_environment_is_one_line(environment: dict[str, str], text: str) -> None:
    with pytest.raises(SharedInputError, match=text):
        set_rank_variables(dict(environment))
