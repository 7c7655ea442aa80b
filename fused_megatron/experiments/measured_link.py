"""Measurements of training steps on two ranks that are joined by a cable of a limited rate."""

import os
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from fused_megatron.checks import check
from fused_megatron.config import TrainConfig
from fused_megatron.experiments.measured_rank import FIRST_TIMED, TIMED_STEPS, Measured, figures_of, recorded_on_rank
from fused_megatron.planning.prediction.measured_steps import RealSteps, slowest_of_ranks
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.testing.two_hosts import DEVICE, TwoHosts, enter_host, limit_device, missing, sent_bytes

RANKS = 2
"""A cable has two ends."""
# A slow cable always has packets of a transfer on their way: its buffer empties every 50 ms at least.
_LOOK_S = 0.05
_QUIET_LOOKS = 3


def why_no_link() -> str | None:
    """Return why this machine cannot have a cable of a limited rate; None if it can."""
    return missing(("ip", "tc"))


def measure_on_link(cases: Mapping[str, tuple[TrainConfig, float]], timeout_s: float) -> dict[str, list[Measured]]:
    """Run training steps of two ranks in two network namespaces, joined by a cable.

    Args:
        cases: by name, a config of two ranks and the rate of the cable in 10^6 bits per second.
        timeout_s: time for all cases together.

    Returns:
        By name, the figures of each rank: figures_of, and bytes_on_link: bytes that the rank's end of the cable sent in
        a step, as the kernel counts them; link_ms: their time at the rate; free_ms: a step without a limit; step_ms: a
        step with it; exposed_ms: their difference.

    Raises:
        InputError: a config of another number of ranks.
        RankError: a rank failed.
    """
    for name, (config, _) in cases.items():
        ranks = config.parallel.num_ranks
        check(
            ranks == RANKS, f"case {name}: link_mbit_per_s needs {RANKS} ranks, one at each end; this case has {ranks}"
        )
    with TwoHosts() as hosts:
        by_rank = run_on_ranks(_measure, RANKS, list(cases.values()), hosts.names, timeout_s=timeout_s)
    return {name: list(ranks) for name, ranks in zip(cases, zip(*by_rank, strict=True), strict=True)}


def _measure(rank: int, world_size: int, cases: list[tuple[TrainConfig, float]], hosts: list[str]) -> list[Measured]:
    """Move this rank to its host, and measure one case after another there."""
    _move(rank, world_size, hosts)
    return [_measure_case(config, mbit_per_s) for config, mbit_per_s in cases]


def _move(rank: int, world_size: int, hosts: list[str]) -> None:
    # The ranks met on the loopback device: the old store stays, and is all that they share from now on.
    store = dist.PrefixStore("link", dist.distributed_c10d._get_default_store())
    dist.barrier()
    dist.destroy_process_group()
    enter_host(hosts[rank])
    os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)


def _measure_case(config: TrainConfig, mbit_per_s: float) -> Measured:
    limit_device(None)
    step = recorded_on_rank(config)
    found = figures_of(step)
    steps = RealSteps(step.assembly, torch.device("cpu"), FIRST_TIMED)
    free = [steps.run() for _ in range(TIMED_STEPS)]
    before = _settled_bytes()
    limit_device(mbit_per_s)
    # The first has no transfers of a step before it, such as gathers of updated weights.
    limited = [steps.run() for _ in range(1 + TIMED_STEPS)]
    num_bytes = (_settled_bytes() - before) / len(limited)
    limit_device(None)
    times = [slowest_of_ranks(each, dist.group.WORLD).median_s(without_waits=False) for each in (free, limited[1:])]
    steps.close()
    return {
        **found,
        "bytes_on_link": num_bytes,
        "link_ms": 8e-3 * num_bytes / mbit_per_s,
        "free_ms": 1e3 * times[0],
        "step_ms": 1e3 * times[1],
        "exposed_ms": 1e3 * (times[1] - times[0]),
    }


def _settled_bytes() -> int:
    """Return the bytes that this end has sent, once both ranks send nothing more."""
    dist.barrier()
    known, quiet = sent_bytes(), 0
    while quiet < _QUIET_LOOKS:
        time.sleep(_LOOK_S)
        now = sent_bytes()
        quiet, known = (quiet + 1, known) if now == known else (0, now)
    return known
