"""The commands `fused-megatron launch slurm` and `launch kubernetes`, which print a file and submit nothing."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_megatron.checks import check, check_one_of
from fused_megatron.planning.command_line import split_options, whole_number
from fused_megatron.planning.job_files.cluster_job import plan_job
from fused_megatron.planning.job_files.kubernetes import KubernetesOptions, kubernetes_file
from fused_megatron.planning.job_files.slurm import SlurmOptions, slurm_file

SCHEDULERS = ("slurm", "kubernetes")
USAGE = """usage: fused-megatron launch slurm CONFIG.toml --nodes N [options] [--section.key value ...] > run.sbatch
       fused-megatron launch kubernetes CONFIG.toml --nodes N [options] [--section.key value ...] > run.yaml

Prints the file with which a scheduler trains the config, and submits nothing. A config without sizes in [parallel] gets
the planner's fastest layout; a layout of the config is kept. The run saves and ends before its time limit or when a pod
is evicted, and resumes. docs/clusters.md has an example of each.

options:
  --nodes N            nodes of the job
  --cluster NAME|FILE  kind of GPU: a100-80gb, h100-80gb, h200, b200 or a prefix, or a cluster file (default:
                       training.cluster of the config, or h100-80gb)
  --gpus-per-node N    ranks of a node (default: all its GPUs)
  --search             let the planner choose the layout, whatever [parallel] says

of slurm:
  --time LIMIT         time limit, as sbatch takes it (default: 24:00:00)
  --stop-before S      seconds before the limit at which the run saves and is requeued (default: 300)
  --setup LINE         line of the shell before the ranks, such as "source /shared/venv/bin/activate"

of kubernetes (a TrainJob of Kubeflow Trainer 2.2 or newer):
  --image NAME         container image (default: fused-megatron, as the Dockerfile builds it)
  --claim NAME         PersistentVolumeClaim with the data and the run (default: shared)
  --mount FOLDER       where it is mounted, the working folder of the image (default: /shared)
  --runtime NAME       ClusterTrainingRuntime (default: torch-distributed)
  --name NAME          name of the job (default: of the config)

Exit code 0: the file is printed; 2: bad input."""

_SHARED = ("--nodes", "--cluster", "--gpus-per-node")
_OWN = {
    "slurm": ("--time", "--stop-before", "--setup"),
    "kubernetes": ("--image", "--claim", "--mount", "--runtime", "--name"),
}


@dataclass(frozen=True)
class LaunchOptions:
    """Parsed arguments of the command.

    Attributes:
        config: the file of the config.
        overrides: options that change its keys.
        num_nodes: nodes of the job.
        gpus_per_node: ranks of a node; None: all its GPUs.
        cluster: name or file of the cluster; None: of the config.
        search: let the planner choose the layout.
        scheduler: options of the scheduler, whose class says which one it is.
    """

    config: Path
    overrides: tuple[str, ...]
    num_nodes: int
    gpus_per_node: int | None
    cluster: str | None
    search: bool
    scheduler: SlurmOptions | KubernetesOptions


def run_launch(words: Sequence[str]) -> int:
    """Print the file of `SCHEDULER CONFIG ...`, and return the exit code.

    Raises:
        InputError: arguments, a config or a cluster that do not fit.
    """
    if any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    options = parse_options(words)
    job = plan_job(
        options.config,
        options.overrides,
        num_nodes=options.num_nodes,
        gpus_per_node=options.gpus_per_node,
        cluster_name=options.cluster,
        search=options.search,
    )
    command = f"fused-megatron launch {' '.join(map(shlex.quote, words))}".replace("\n", " ")  # a comment of one line
    if isinstance(options.scheduler, SlurmOptions):
        text = slurm_file(job, options.scheduler, command)
    else:
        text = kubernetes_file(job, options.scheduler, command)
    print(text, end="")
    return 0


def parse_options(words: Sequence[str]) -> LaunchOptions:
    """Parse the arguments of `fused-megatron launch SCHEDULER`; the config is not read.

    Raises:
        InputError: an option lacks its value or does not fit.
    """
    scheduler, *rest = words
    check_one_of("launch", scheduler, SCHEDULERS)
    found, others = split_options(rest, (*_SHARED, *_OWN[scheduler]), ("--search",))
    check(
        len(others) > 0 and not others[0].startswith("-"),
        f"launch {scheduler} needs a config file (to write one: fused-megatron init my.toml)",
    )
    check("--nodes" in found, f"launch {scheduler} needs --nodes, the number of nodes, such as --nodes 8")
    own = {_key(name): found[name] for name in _OWN[scheduler] if name in found}
    per_node = found.get("--gpus-per-node")
    return LaunchOptions(
        Path(others[0]),
        tuple(others[1:]),
        whole_number("nodes", found["--nodes"]),
        None if per_node is None else whole_number("gpus_per_node", per_node),
        found.get("--cluster"),
        "--search" in found,
        _slurm_options(own) if scheduler == "slurm" else KubernetesOptions(**own),
    )


def _key(option: str) -> str:
    return option[2:].replace("-", "_")


def _slurm_options(own: dict[str, str]) -> SlurmOptions:
    default, stop = SlurmOptions(), own.get("stop_before")
    return SlurmOptions(
        own.get("time", default.time),
        default.stop_before_s if stop is None else whole_number("stop_before", stop),
        own.get("setup", default.setup),
    )
