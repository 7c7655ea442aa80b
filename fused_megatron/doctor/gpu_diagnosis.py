"""Findings of the trials on GPUs, and of their place in the machine."""

from collections.abc import Iterator

from fused_megatron.doctor.facts import Facts, Library, numbers
from fused_megatron.doctor.finding import BROKEN, NOTE, SLOW, Finding

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables with the options of torch's allocator; the second is the older name."""
# Two GPUs over NVLink reach 100 GB/s and more; over PCIe at most 60.
_SLOW_NVLINK_GB_PER_S = 60.0


def diagnose_gpus(facts: Facts) -> Iterator[Finding]:
    """Yield the findings; none without a GPU."""
    if not facts.torch.sees_gpus:
        return
    yield from _driver(facts)
    yield from _ops(facts)
    yield from _attention(facts)
    yield from _two_ranks(facts)
    yield from _buses(facts)
    if not has_expandable_segments(facts):
        yield Finding(
            NOTE,
            "torch's allocator keeps fixed segments, whose fragments are lost: expandable segments have none",
            "export PYTORCH_ALLOC_CONF=expandable_segments:True",
        )


def has_expandable_segments(facts: Facts) -> bool:
    """Return whether the environment asks torch's allocator for expandable segments."""
    chosen = (facts.environment.get(name, "") for name in ALLOCATOR_VARIABLES)
    return any("expandable_segments:true" in text.lower().replace(" ", "") for text in chosen)


def driver_fits(library: Library, driver_cuda: str | None) -> bool:
    """Return whether a driver starts the library's kernels: its CUDA has at least their major version."""
    if not library.toolkit or not driver_cuda:
        return True  # not known
    return numbers(driver_cuda)[:1] >= numbers(library.toolkit)[:1]


def _driver(facts: Facts) -> Iterator[Finding]:
    machine, library = facts.machine, facts.library
    if not driver_fits(library, machine.driver_cuda):
        yield Finding(
            BROKEN,
            f"driver {machine.driver} is of CUDA {machine.driver_cuda}, the library of CUDA {library.toolkit}: its "
            "kernels do not start",
            "export FUSED_MEGATRON_LIBRARY=  # slower; or a newer driver, or build with an older nvcc",
        )


def _ops(facts: Facts) -> Iterator[Finding]:
    kinds = {op.op: op.gpu for op in facts.library.ops}
    for trial in facts.gpu_trials.ops:
        if trial.problem is not None:
            kind = kinds.get(trial.op, "reference")
            mends = "export FUSED_MEGATRON_LIBRARY=  # all compiled ops run on their slower reference"
            yield Finding(BROKEN, f"{trial.op} ({kind}) on GPU 0: {trial.problem}", mends if kind == "CUDA" else "")


def _attention(facts: Facts) -> Iterator[Finding]:
    for each in facts.gpu_trials.attention:
        if each.kernel == "MATH":
            yield Finding(SLOW, f"attention of {each.inputs} stores all scores: MATH ({each.reason})")


def _two_ranks(facts: Facts) -> Iterator[Finding]:
    trial = facts.gpu_trials.two_ranks
    if trial is None:
        return
    has_nvlink = any(kind.startswith("NV") for kind in facts.machine.links)
    if trial.problem is not None:
        yield Finding(
            BROKEN,
            f"two NCCL ranks on this machine could not add up: {trial.problem}",
            "NCCL_DEBUG=INFO fused-megatron doctor",
        )
    elif has_nvlink and trial.gb_per_s is not None and trial.gb_per_s < _SLOW_NVLINK_GB_PER_S:
        yield Finding(
            SLOW,
            f"two NCCL ranks reach {trial.gb_per_s:.0f} GB/s, less than NVLink has",
            "NCCL_DEBUG=INFO fused-megatron doctor  # says which links NCCL takes",
        )
    if trial.problem is None and has_nvlink and not trial.maps_memory:
        yield Finding(NOTE, "GPUs do not map each other's memory: torch's fused products with collectives are not used")


def _buses(facts: Facts) -> Iterator[Finding]:
    buses = facts.machine.buses
    if len(set(buses.gpu_nodes.values()) - {-1}) > 1:
        yield Finding(
            NOTE,
            f"the GPUs are at {len(set(buses.gpu_nodes.values()))} memory nodes of the processors: a rank should run "
            "beside its GPU",
            "torchrun --numa-binding node ...",
        )
    for port in buses.infiniband:
        if "ACTIVE" not in port:
            yield Finding(NOTE, f"the network card {port} is not active")
    if buses.infiniband and not buses.peer_memory:
        yield Finding(
            NOTE,
            "nvidia_peermem is not loaded: unless the driver exports DMA-BUF, network cards reach GPUs through the "
            "memory of the host",
            "sudo modprobe nvidia_peermem",
        )
