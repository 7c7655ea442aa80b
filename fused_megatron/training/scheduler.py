"""Environment variables of torchrun for ranks that srun or mpirun started."""

import os
import zlib
from collections.abc import MutableMapping
from dataclasses import dataclass

from fused_megatron.checks import SharedInputError
from fused_megatron.training.launcher import STORE_VARIABLE

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Names of torchrun."""


@dataclass(frozen=True)
class _Launcher:
    """Environment variables of a launcher.

    Attributes:
        name: command of the launcher.
        rank_variables: its names for the RANK_VARIABLES.
        job_variables: variables that together identify the job, with the same values on all its ranks.
    """

    name: str
    rank_variables: tuple[str, str, str, str]
    job_variables: tuple[str, ...]


# For Slurm the variables of a job step: a batch script, which is one process, also has the variables of its job.
# The number of tasks per node may look like "4(x2)".
_LAUNCHERS = (
    _Launcher(
        "srun",
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
    _Launcher(
        "mpirun",
        (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ),
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    _Launcher("mpiexec", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"), ("PMI_ID", "HYDI_CONTROL_FD")),
)
_FIRST_PORT, _NUM_PORTS = 20000, 10000


def set_rank_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables in a rank that srun or mpirun started; change nothing under torchrun, or for one rank.

    Without this every rank would be a run of its own, all in one run folder.

    Raises:
        SharedInputError: ranks of several machines have no MASTER_ADDR, or RANK does not fit WORLD_SIZE.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        for launcher in _LAUNCHERS:
            rank_name, size_name = launcher.rank_variables[:2]
            if environment.get(size_name, "1") != "1" and rank_name in environment:
                _set_variables(launcher, environment)
                break
    _check(environment)


def _set_variables(launcher: _Launcher, environment: MutableMapping[str, str]) -> None:
    found = [environment.get(name, "").partition("(")[0].partition(",")[0] for name in launcher.rank_variables]
    rank, world_size, local_rank, local_world_size = found
    if "MASTER_ADDR" not in environment:
        if local_world_size != world_size:
            raise SharedInputError(
                f"{launcher.name} started {world_size} ranks on several machines, which cannot find each other: set "
                "MASTER_ADDR to the name of rank 0's machine (and MASTER_PORT to a free port), or start torchrun"
            )
        environment["MASTER_ADDR"] = "127.0.0.1"
    job = " ".join(environment.get(name, "") for name in launcher.job_variables)
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS))
    environment.update(zip(RANK_VARIABLES, (rank, world_size, local_rank or "0", local_world_size or "1"), strict=True))


def _check(environment: MutableMapping[str, str]) -> None:
    world_size, rank = environment.get("WORLD_SIZE", "1"), environment.get("RANK", "0")
    if not world_size.isdecimal() or not rank.isdecimal() or int(rank) >= int(world_size):
        raise SharedInputError(
            f"RANK={rank} and WORLD_SIZE={world_size} must be whole numbers, the rank below the size (start the ranks "
            "with torchrun or fused-megatron launch, which set both)"
        )
    local_rank, port = environment.get("LOCAL_RANK", "0"), environment.get("MASTER_PORT", "1")
    local_size = environment.get("LOCAL_WORLD_SIZE", "1")
    if not local_rank.isdecimal() or not local_size.isdecimal():
        raise SharedInputError(
            f"LOCAL_RANK={local_rank} and LOCAL_WORLD_SIZE={local_size} must be whole numbers (torchrun and "
            "fused-megatron launch set both)"
        )
    if not port.isdecimal() or not 1 <= int(port[:9]) <= 65535:
        raise SharedInputError(f"MASTER_PORT={port} must be a port, 1 to 65535, that is free on rank 0's machine")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if int(world_size) > 1 and missing and STORE_VARIABLE not in environment:
        raise SharedInputError(
            f"WORLD_SIZE={world_size} without {' and '.join(missing)}: the ranks cannot find each other (start them "
            "with torchrun or fused-megatron launch, or set what is missing)"
        )
