"""Times of real training steps of a config on the ranks of this process group, with the trainer's own parts."""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from fused_megatron.assembly.assemble import Assembly, assemble
from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.assembly.step_sums import StepSums
from fused_megatron.assembly.training_step import training_step
from fused_megatron.collectives.together import gather_json
from fused_megatron.config import TrainConfig
from fused_megatron.data.batch import Batch
from fused_megatron.kept_pages import keep_malloc_pages
from fused_megatron.mesh import Mesh
from fused_megatron.observe.core_speed import CoreSpeed
from fused_megatron.observe.core_time import CoreTime, cores_busy_s, quiet_median_s
from fused_megatron.planning.prediction.machine_measurements import cores_of_ranks, threads_of_rank


class RankStep(NamedTuple):
    """A step on a rank.

    Attributes:
        seconds, wait_s: time of the step, and the part of it in which the rank wanted a core and had none.
        probe_s: time of a probe of the core's speed beside the step.
        own_s, all_s: seconds of the cores that the rank took in the step, and that all processes of the machine took.
    """

    seconds: float
    wait_s: float
    probe_s: float = 0.0
    own_s: float = 0.0
    all_s: float = 0.0


@dataclass(frozen=True)
class StepTimes:
    """Measured steps of a config.

    Attributes:
        seconds: of each step, until its last rank is done.
        waits: for each step, seconds in which other processes held the core of the rank that waited longest; with more
            ranks than cores, seconds of all cores that other processes took, over the number of cores.
        probes: for each step, seconds of CoreSpeed's work beside it, the mean of the ranks; empty on a GPU.
    """

    seconds: tuple[float, ...]
    waits: tuple[float, ...]
    probes: tuple[float, ...] = ()

    def __add__(self, other: "StepTimes") -> "StepTimes":
        return StepTimes(self.seconds + other.seconds, self.waits + other.waits, self.probes + other.probes)

    def median_s(self, *, without_waits: bool, probe_s: float | None = None) -> float:
        """Return the median of the steps.

        Args:
            without_waits: leave out the time that other processes took.
            probe_s: seconds of CoreSpeed's work at the speed of cores for which the median is wanted; None: as they
                were.
        """
        scales = [probe_s / probe for probe in self.probes] if probe_s and self.probes else [1.0] * len(self.seconds)
        steps = [(s * by, w * by) for s, w, by in zip(self.seconds, self.waits, scales, strict=True)]
        return quiet_median_s(steps) if without_waits else statistics.median(seconds for seconds, _ in steps)

    @property
    def busy_share(self) -> float:
        """Share of the time in which other processes held the cores."""
        return sum(self.waits) / (sum(self.seconds) or 1.0)


def median_probe_s(times: Iterable[StepTimes]) -> float | None:
    """Return the median of all probes; None without any."""
    probes = [probe for each in times for probe in each.probes]
    return statistics.median(probes) if probes else None


class RealSteps:
    """Training steps of an assembled run on random tokens. Every rank of the default process group makes one.

    Args:
        assembly: the parts of this rank; model.vocab_size must be set in its config.
        device: of this rank.
        first_step: number of the first step.
    """

    def __init__(self, assembly: Assembly, device: torch.device, first_step: int = 0) -> None:
        config = assembly.config
        self.assembly = assembly
        self._group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
        self._batch = random_batch(config, assembly.mesh, device)
        self._num_targets = config.training.global_batch_size * config.model.seq_len
        self._device = device
        self._step = first_step

    def run(self) -> RankStep:
        """Run a step after a barrier; return its seconds and the wait for a core on this rank."""
        self._meet()
        clock = CoreTime()
        training_step(
            self.assembly,
            lambda: self._batch,
            step=self._step,
            lr=1e-4,
            num_targets=self._num_targets,
            group=self._group,
            flags=tuple,
            num_refusing=0,
            judge=_accept,
        )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._step += 1
        return RankStep(*clock.stop())

    def times(self, rounds: int, warm_up: int = 1) -> StepTimes:
        """Run warm-up steps and then `rounds` steps; return their times, the same on every rank."""
        for _ in range(warm_up):
            self.run()
        if self._device.type == "cuda":
            return slowest_of_ranks([self.run() for _ in range(rounds)], self._group)
        speed = CoreSpeed()
        return slowest_of_ranks([self._run_beside(speed) for _ in range(rounds)], self._group)

    def _run_beside(self, speed: CoreSpeed) -> RankStep:
        """Run a step between two probes of the core's speed."""
        before_s = speed.probe_s()
        self._meet()
        own_s, all_s = time.process_time(), cores_busy_s()
        step = self.run()
        own_s = time.process_time() - own_s
        self._meet()
        all_s = cores_busy_s() - all_s
        return step._replace(probe_s=(before_s + speed.probe_s()) / 2, own_s=own_s, all_s=all_s)

    def _meet(self) -> None:
        if self._group is not None:
            dist.barrier()

    def close(self) -> None:
        """Cut the connections of the pipeline. The groups of the mesh stay until the process ends."""
        self.assembly.executor.close()


def start_rank(rank: int, world_size: int, device_type: str) -> torch.device:
    """Set threads, malloc and the GPU of this rank as training does; return its device."""
    if device_type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    keep_malloc_pages()
    torch.set_num_threads(threads_of_rank(world_size))
    return torch.device("cpu")


def steps_on_rank(rank: int, world_size: int, device_type: str, config: TrainConfig, rounds: int) -> StepTimes:
    """Return the times of steps of a config on all ranks of the default process group; every rank calls this."""
    device = start_rank(rank, world_size, device_type)
    mesh, plan = build_mesh(config, device.type), plan_pipeline(config)
    steps = RealSteps(assemble(config, mesh, plan, build_stages(config, mesh, plan, device)), device)
    times = steps.times(rounds)
    steps.close()
    return times


def slowest_of_ranks(steps: list[RankStep], group: dist.ProcessGroup | None) -> StepTimes:
    """Return the times of each step over all ranks, the same on every rank."""
    cores, by_step = cores_of_ranks(group), zip(*gather_json(steps, group), strict=True)
    seconds, waits, probes = zip(*(slowest_step(ranks, cores) for ranks in by_step), strict=True)
    return StepTimes(seconds, waits, probes if all(probes) else ())


def slowest_step(ranks: Sequence[RankStep], cores: int) -> tuple[float, float, float]:
    """Return the seconds of a step's slowest rank, what other processes took of it, and the mean probe."""
    seconds, waited, probes, own, every = zip(*ranks, strict=True)
    wait_s = max(waited)
    if len(ranks) > cores:
        # Ranks that share a core wait for each other, too.
        wait_s = min(max(seconds), max(0.0, min(every) - sum(own)) / cores)
    return max(seconds), wait_s, statistics.mean(probes)


def random_batch(config: TrainConfig, mesh: Mesh, device: torch.device) -> Batch:
    """Return this data-parallel rank's rows of a batch of random tokens, each with a target."""
    rows, seq_len = config.training.global_batch_size // mesh.dp_size, config.model.seq_len
    generator = torch.Generator().manual_seed(mesh.dp_rank)
    tokens = torch.randint(config.model.vocab_size or 1, (rows, seq_len + 1), generator=generator)
    if device.type == "cuda":
        tokens = tokens.pin_memory()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def _accept(sums: StepSums) -> None:
    """Let every update happen."""
