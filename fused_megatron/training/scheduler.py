"""Ranks that srun or mpirun started without torchrun: their places, in the variables that torchrun sets."""

import os
import zlib
from collections.abc import MutableMapping
from dataclasses import dataclass

from fused_megatron.checks import SharedInputError
from fused_megatron.training.launcher import STORE_VARIABLE

PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class _Launcher:
    """What a launcher calls a rank's places (as PLACES), and what names the job on all of its ranks."""

    name: str
    places: tuple[str, str, str, str]
    job: tuple[str, ...]


# Of a step, since a batch script has those of the job, too, and is one process. Tasks per node may read "4(x2)".
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


def take_places(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give a rank that srun or mpirun started its places in torchrun's variables; nothing under torchrun, or for one.

    Without this each of them would be a run of its own, in one run folder.

    Raises:
        SharedInputError: ranks of several machines that do not know where to meet; a RANK that does not fit WORLD_SIZE.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        for launcher in _LAUNCHERS:
            if environment.get(launcher.places[1], "1") != "1" and launcher.places[0] in environment:
                _take(launcher, environment)
                break
    _check(environment)


def _take(launcher: _Launcher, environment: MutableMapping[str, str]) -> None:
    found = [environment.get(name, "").partition("(")[0].partition(",")[0] for name in launcher.places]
    rank, world_size, local_rank, local_world_size = found
    if "MASTER_ADDR" not in environment:
        if local_world_size != world_size:
            raise SharedInputError(
                f"{launcher.name} started {world_size} ranks on several machines, which do not know where to meet: set "
                "MASTER_ADDR to the name of rank 0's machine (and MASTER_PORT to a free port), or start torchrun"
            )
        environment["MASTER_ADDR"] = "127.0.0.1"
    job = " ".join(environment.get(name, "") for name in launcher.job)
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS))
    environment.update(zip(PLACES, (rank, world_size, local_rank or "0", local_world_size or "1"), strict=True))


def _check(environment: MutableMapping[str, str]) -> None:
    world_size, rank = environment.get("WORLD_SIZE", "1"), environment.get("RANK", "0")
    if not world_size.isdecimal() or not rank.isdecimal() or int(rank) >= int(world_size):
        raise SharedInputError(
            f"RANK={rank} and WORLD_SIZE={world_size} must be whole numbers, the rank below the size (start the ranks "
            "with torchrun or fused-megatron launch, which set both)"
        )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if int(world_size) > 1 and missing and STORE_VARIABLE not in environment:
        raise SharedInputError(
            f"WORLD_SIZE={world_size} without {' and '.join(missing)}: the ranks cannot find each other (start them "
            "with torchrun or fused-megatron launch, or set what is missing)"
        )
