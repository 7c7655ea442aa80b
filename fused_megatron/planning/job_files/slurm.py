"""The batch file of Slurm: one task a GPU, signals to the ranks before the time limit, requeue and resume."""

import re
import shlex
from dataclasses import dataclass

from fused_megatron.checks import InputError, check
from fused_megatron.planning.job_files.cluster_job import STOPPED_CODE, ClusterJob

_TIME = re.compile(r"(?:(?P<days>\d{1,4})-)?(?P<first>\d{1,6})(?::(?P<second>\d{1,2}))?(?::(?P<third>\d{1,2}))?")
_MOST_SIGNAL_S = 65535
"""Largest time of --signal that Slurm takes."""
_SLOW_END_S = 180
"""Time beyond parallel.timeout_s for ranks that lost another rank to say so and end."""


@dataclass(frozen=True)
class SlurmOptions:
    """Options of the file.

    Attributes:
        time: time limit, as sbatch takes it.
        stop_before_s: seconds before the limit at which the run saves and ends.
        setup: line of the shell that comes before the ranks, such as the activation of an environment; "": none.
        restarts: how often the ranks start again in the same job after a failure.
    """

    time: str = "24:00:00"
    stop_before_s: int = 300
    setup: str = ""
    restarts: int = 3

    def __post_init__(self) -> None:
        limit = time_limit_s(self.time)
        check(
            1 <= self.stop_before_s <= _MOST_SIGNAL_S and self.stop_before_s < limit,
            f"stop_before={self.stop_before_s} must be 1 to {_MOST_SIGNAL_S:,} seconds, and less than time={self.time} "
            f"({limit:,} s)",
        )
        check("\n" not in self.setup, f"setup={self.setup!r:.60} must be one line (a file: source FILE)")


def time_limit_s(text: str) -> int:
    """Return the seconds of a time limit: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        InputError: another form, or no time.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise InputError(f"time={text!r:.40} must be a time limit of Slurm, such as 90, 24:00:00 or 2-12:00:00")
    first, second, third = (int(match[name] or 0) for name in ("first", "second", "third"))
    if match["days"] is not None:
        seconds = int(match["days"]) * 86400 + first * 3600 + second * 60 + third
    elif match["third"] is not None:
        seconds = first * 3600 + second * 60 + third
    else:
        seconds = first * 60 + second
    check(seconds > 0, f"time={text} must be above 0")
    return seconds


def slurm_file(job: ClusterJob, options: SlurmOptions, command: str) -> str:
    """Return the text of the batch file.

    Args:
        job: the run and its nodes.
        options: of the file.
        command: the command that printed the file, for its head.
    """
    ranks, gpus = job.cluster.gpus_per_node, job.cluster.device == "cuda"
    settings = [
        f"--job-name={_job_name(job)}",
        f"--nodes={job.num_nodes}",
        f"--ntasks-per-node={ranks}",
        *([f"--gpus-per-node={ranks}"] if gpus else []),
        *(["--exclusive"] if job.whole_nodes else []),
        f"--time={options.time}",
        f"--signal=B:USR1@{options.stop_before_s}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.log",
    ]
    head = ["#!/bin/bash", f"# {command}", *(f"# {line}" for line in job.description())]
    return "\n".join([*head, *(f"#SBATCH {setting}" for setting in settings), "", _body(job, options)]) + "\n"


def _job_name(job: ClusterJob) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", job.config_path.stem) or "run"


def _body(job: ClusterJob, options: SlurmOptions) -> str:
    ranks = job.cluster.gpus_per_node
    # A task that sees only its own GPU would have no peer in its node. Rank order: neighbours share a node.
    flags = ["--kill-on-bad-exit=0", f"--wait={int(job.config.parallel.timeout_s) + _SLOW_END_S}"]
    flags += ["--distribution=block:block", *(["--gpu-bind=none"] if job.cluster.device == "cuda" else [])]
    train = " ".join(map(shlex.quote, job.train_words))
    setup = [options.setup] if options.setup else []
    return "\n".join(
        [
            _START.format(ranks=ranks, code=STOPPED_CODE),
            *setup,
            _RANKS.format(flags=" ".join(flags), train=train, restarts=options.restarts),
        ]
    )


# The address of rank 0's node; the port follows from the job and the step (training/scheduler.py).
_START = """\
set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
# srun gives a task one core unless it is told otherwise.
cores=$(( ${{SLURM_CPUS_ON_NODE:-{ranks}}} / {ranks} ))
export SRUN_CPUS_PER_TASK=$(( cores > 0 ? cores : 1 ))
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}}
# Exit code of ranks that were asked to end and have saved: the run is not done.
export FUSED_MEGATRON_STOPPED_CODE={code}"""

_RANKS = """\

asked= came=0 step=
# Slurm signals only this shell before the time limit; srun passes signals on to all ranks, which save and end.
forward() {{
    asked=$1 came=$(( came + 1 ))
    [ -z "$step" ] || kill -s "$1" "$step" 2> /dev/null
}}
trap 'forward USR1' USR1
trap 'forward TERM' TERM

start_ranks() {{
    # After a failure the other ranks say what they lost and end by themselves: srun must not kill them before.
    srun {flags} \\
        python -m fused_megatron {train} &
    step=$!
    while :; do
        local before=$came
        wait "$step"
        code=$?
        [ "$before" != "$came" ] || break  # else a signal ended the wait, not the ranks
    done
    step=
}}

failures=0
while [ -z "$asked" ]; do
    start_ranks
    # Done, bad input, or asked to end by another way: starting again would not help.
    case $code in 0 | 2 | "$FUSED_MEGATRON_STOPPED_CODE") break ;; esac
    [ -z "$asked" ] || break
    failures=$(( failures + 1 ))
    [ "$failures" -le "${{RESTARTS:-{restarts}}}" ] || break
    echo "the ranks ended with exit code $code; start $failures of ${{RESTARTS:-{restarts}}} from the newest checkpoint"
done

# Only before the time limit: a job that its user cancels (SIGTERM) saves, and stays cancelled.
if [ "$asked" = USR1 ] && [ "${{code:-1}}" != 0 ] && [ "${{code:-1}}" != 2 ]; then
    echo "the time limit is near: requeued, and resumes from its newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "${{code:-1}}\""""
