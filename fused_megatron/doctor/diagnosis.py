"""Diagnosis of the facts: a pure function to findings (broken, slow, or worth a note) with commands that mend them."""

import fnmatch
import math
from collections.abc import Iterator

from fused_megatron.doctor.device_code import runs_on
from fused_megatron.doctor.facts import Facts, Gpu, numbers
from fused_megatron.doctor.finding import BROKEN, NOTE, SLOW, Finding
from fused_megatron.doctor.gpu_diagnosis import ALLOCATOR_VARIABLES, diagnose_gpus
from fused_megatron.optional_packages import install_command

_SLOW_LOOKUP_S = 0.5
_OLDEST_NVCC = "12.8"
_SMALL_SHARED_MEMORY_GB = 0.5
# Environment variables that make training slow: (value, effect).
_SLOWING = {
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel launch waits for its end"),
    "TRITON_INTERPRET": ("1", "Triton kernels run in Python"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "every collective is checked by another one"),
    "NCCL_P2P_DISABLE": ("1", "GPUs of a machine do not use their links"),
    "NCCL_SHM_DISABLE": ("1", "GPUs of a machine talk over the network"),
    "NCCL_IB_DISABLE": ("1", "machines talk over TCP"),
    "TORCHDYNAMO_DISABLE": ("1", "torch.compile does nothing"),
}
# Variables that torchrun sets for its ranks. In a shell, they make a program wait for ranks that nobody starts.
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
# Environment variables that the doctor reads.
VARIABLES = (
    *_OF_TORCHRUN, *_SLOWING, "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_MAX_CONNECTIONS", "FUSED_MEGATRON_LIBRARY", "TORCHELASTIC_RUN_ID", *ALLOCATOR_VARIABLES,
)  # fmt: skip


def diagnose(facts: Facts) -> list[Finding]:
    """Return all findings, the worst first."""
    parts = (
        _packages,
        _library,
        _gpus,
        _gpu_kernels,
        diagnose_gpus,
        _names,
        _interfaces,
        _loopback,
        _threads,
        _environment,
        _tokens,
    )
    found = [finding for part in parts for finding in part(facts)]
    return sorted(found, key=lambda finding: (BROKEN, SLOW, NOTE).index(finding.level))


def _packages(facts: Facts) -> Iterator[Finding]:
    packages = facts.installation.packages
    asked = {package.name: package for package in packages}.get("torch")
    if asked is not None and asked.installed and facts.torch.error:
        yield Finding(
            BROKEN,
            f"torch {asked.installed} does not import: {facts.torch.error}",
            f'pip install --force-reinstall "{asked.requirement}"',
        )
    for package in packages:
        if package.fits or package.extra is not None:
            continue
        state = f"{package.name} {package.installed} is too old" if package.installed else f"{package.name} is missing"
        yield Finding(
            BROKEN, f"{state} ({package.requirement} is needed)", f'pip install --upgrade "{package.requirement}"'
        )
    # Triton is worth a finding only beside a GPU (_gpu_kernels).
    for extra in dict.fromkeys(package.extra for package in packages if package.extra not in (None, "triton")):
        unfit = [package for package in packages if package.extra == extra and not package.fits]
        if unfit:
            names = ", ".join(package.name for package in unfit)
            wanted = " ".join(f'"{package.requirement}"' for package in unfit)
            yield Finding(NOTE, f"the optional part {extra!r} is not installed ({names})", f"pip install {wanted}")


def _library(facts: Facts) -> Iterator[Finding]:
    library = facts.library
    chosen = facts.environment.get("FUSED_MEGATRON_LIBRARY")
    if chosen is not None:
        level = SLOW if not chosen else NOTE if library.loads else BROKEN
        state = f"FUSED_MEGATRON_LIBRARY={chosen} replaces the library that was built"
        if not library.loads:
            state = f"FUSED_MEGATRON_LIBRARY={chosen}: all ops run on their slower reference"
        yield Finding(level, state, "unset FUSED_MEGATRON_LIBRARY")
        return
    if not library.exists:
        compiler = "" if facts.tools.cxx else " (first a C++20 compiler: apt-get install g++)"
        yield Finding(
            SLOW, f"no compiled kernels{compiler}: all ops run on their slower PyTorch reference", _build(facts)
        )
        return
    if facts.torch.error:
        return
    if not library.loads:
        yield Finding(BROKEN, f"the compiled library {library.reason}", _build(facts))
        return
    if library.changed_since:
        yield Finding(NOTE, f"{library.changed_since} has changed since the library was built", _build(facts))
    slow = [op.op for op in library.ops if op.cpu == "reference"]
    if slow:
        yield Finding(
            SLOW, f"the library has no CPU kernel for {', '.join(slow)}: it is of another release", _build(facts)
        )


def _build(facts: Facts, cuda: bool = False) -> str:
    """Return the command that builds the library; in a checkout it keeps the installation."""
    setting = "FUSED_MEGATRON_CUDA=on " if cuda else ""
    if facts.installation.checkout:
        return f"cd {facts.installation.checkout} && {setting}pip install --no-build-isolation -e ."
    return f"{setting}pip install --force-reinstall --no-deps .  # in the source folder"


def _gpus(facts: Facts) -> Iterator[Finding]:
    machine, torch = facts.machine, facts.torch
    if not machine.gpus or torch.error:
        return
    count = f"{len(machine.gpus)} x {machine.gpus[0].name}"
    if torch.build.startswith("CPU"):
        yield Finding(
            SLOW,
            f"{count}, but torch is a CPU build",
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130",
        )
    elif not torch.sees_gpus and facts.environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding(
            SLOW, "CUDA_VISIBLE_DEVICES hides every GPU: training would run on the CPU", "unset CUDA_VISIBLE_DEVICES"
        )
    elif not torch.sees_gpus:
        yield Finding(
            BROKEN,
            f"{count}, but torch ({torch.build}) cannot use them: driver {machine.driver} is too old for it, "
            "or this container has no access",
            "nvidia-smi  # says the newest CUDA of the driver; then another torch",
        )
    elif torch.sees_gpus < len(machine.gpus):
        chosen = facts.environment.get("CUDA_VISIBLE_DEVICES", "")
        yield Finding(NOTE, f"torch sees {torch.sees_gpus} of {count} (CUDA_VISIBLE_DEVICES={chosen})")
    if torch.sees_gpus > 1 and not torch.backends.get("nccl"):
        yield Finding(
            SLOW,
            f"{torch.sees_gpus} GPUs, but this torch has no NCCL: ranks would talk through the CPU",
            "pip install --force-reinstall torch",
        )
    shared = machine.shared_memory_gb
    if torch.sees_gpus > 1 and shared is not None and shared < _SMALL_SHARED_MEMORY_GB:
        yield Finding(
            SLOW,
            f"/dev/shm has {shared * 1e3:.0f} MB: NCCL fails or leaves it with several GPUs",
            "docker run --shm-size=8g ...  # or --ipc=host",
        )


def _gpu_kernels(facts: Facts) -> Iterator[Finding]:
    """Check that the library has code for each GPU, that Triton is installed, and that it has a C compiler."""
    library, torch = facts.library, facts.torch
    if not torch.sees_gpus:
        return
    if library.loads and not library.device_code:
        way = "" if facts.tools.nvcc else " (no nvcc was found: the build takes it from PyPI)"
        yield Finding(
            SLOW,
            f"the library has no CUDA kernels{way}: norms, activations, dropout and rotary embeddings run on "
            "their slower PyTorch reference",
            _build(facts, cuda=True),
        )
    elif library.loads:
        for gpu in _kinds(facts.machine.gpus):
            code = runs_on(library.device_code, gpu.capability)
            if code is None:
                yield Finding(
                    BROKEN,
                    f"{gpu.name} (compute capability {gpu.capability}) runs none of the library's code "
                    f"({', '.join(library.device_code)}): fused ops fail on it",
                    "export FUSED_MEGATRON_LIBRARY=  # without compiled kernels: slower, and works",
                )
            elif code.startswith("ptx"):
                yield Finding(
                    NOTE,
                    f"{gpu.name} (compute capability {gpu.capability}) runs the library's PTX ({code}): its "
                    "driver compiles it at the first start, once, and keeps it",
                )
    release = facts.tools.nvcc_release
    if not library.device_code and release and numbers(release) < numbers(_OLDEST_NVCC):
        yield Finding(
            NOTE,
            f"nvcc {release} ({facts.tools.nvcc}) is too old for the CUDA kernels ({_OLDEST_NVCC} is needed)",
            "export PATH=/usr/local/cuda-13.0/bin:$PATH  # or hide it: the build then takes nvcc from PyPI",
        )
    triton = [op.op for op in library.ops if op.gpu == "Triton"]
    if library.ops and not triton:
        yield Finding(
            SLOW,
            "Triton is not installed: losses, softmax and experts run on their slower PyTorch reference on a GPU",
            install_command("triton"),
        )
    if triton and facts.tools.cc is None:
        yield Finding(
            BROKEN,
            f"no C compiler, which Triton needs at run time: {', '.join(triton)} fail on a GPU",
            "apt-get install gcc",
        )


def _kinds(gpus: tuple[Gpu, ...]) -> list[Gpu]:
    return list({(gpu.name, gpu.capability): gpu for gpu in gpus}.values())


def _names(facts: Facts) -> Iterator[Finding]:
    """Check the name look-ups of starting ranks: a name server without an answer delays each by 5 s or more."""
    network = facts.network
    chosen = facts.environment.get("GLOO_SOCKET_IFNAME")
    outer = _outer_interface(facts)
    if _is_slow(network.localhost_lookup_s):
        yield Finding(
            SLOW,
            f"the name of 127.0.0.1 takes {_seconds(network.localhost_lookup_s)}: every rank that meets others "
            "on this machine (torchrun, TCPStore) waits that long",
            "echo 127.0.0.1 localhost | sudo tee -a /etc/hosts  # and torchrun --local-addr 127.0.0.1",
        )
    if chosen:
        return
    if _is_slow(network.host_lookup_s):
        yield Finding(
            SLOW,
            f"the host's name {network.hostname!r} takes {_seconds(network.host_lookup_s)} to resolve: every "
            "gloo group waits that long",
            f"export GLOO_SOCKET_IFNAME={outer or _loopback_name(facts)}",
        )
    elif outer and not [a for a in network.local_addresses if not a.startswith(("127.", "::1"))]:
        what = "no address of this machine"
        if network.local_addresses:
            what = network.local_addresses[0]
        yield Finding(
            NOTE,
            f"the host's name {network.hostname!r} resolves to {what}: gloo ranks on other machines could not "
            "reach this one (ranks on this machine do)",
            f"export GLOO_SOCKET_IFNAME={outer}",
        )


def _tokens(facts: Facts) -> Iterator[Finding]:
    for file in facts.tokens:
        if file.problem is not None:
            folder = file.prefix.rpartition("/")[0]
            yield Finding(BROKEN, file.problem, f"rm -r {folder}  # it is prepared again" if file.in_cache else "")
        elif not file.has_digest:
            yield Finding(NOTE, f"{file.prefix}.bin has no checksums: nothing can tell whether it is damaged")
    unread = [file for file in facts.tokens if not file.is_read and file.problem is None]
    if unread:
        yield Finding(
            NOTE,
            f"{len(unread)} prepared token file(s) of {sum(file.num_bytes for file in unread) / 1e9:.1f} GB were not "
            f"read to their end",
            f"fused-megatron doctor --data {unread[0].prefix}",
        )


def _is_slow(seconds: float | None) -> bool:
    return seconds is None or seconds > _SLOW_LOOKUP_S


def _seconds(seconds: float | None) -> str:
    return "longer than the doctor waits" if seconds is None else f"{seconds:.1f} s"


def _outer_interface(facts: Facts) -> str | None:
    found = [name for name, address in facts.network.interfaces.items() if address and not address.startswith("127.")]
    return found[0] if found else None


def _loopback_name(facts: Facts) -> str:
    found = [name for name, address in facts.network.interfaces.items() if address.startswith("127.")]
    return found[0] if found else "lo"


def _interfaces(facts: Facts) -> Iterator[Finding]:
    have = facts.network.interfaces
    chosen = facts.environment.get("GLOO_SOCKET_IFNAME", "")
    missing = [name for name in filter(None, chosen.split(",")) if name not in have]
    if missing:
        yield Finding(
            BROKEN, f"GLOO_SOCKET_IFNAME={chosen}, but this machine has {', '.join(have)}", "unset GLOO_SOCKET_IFNAME"
        )
    # NCCL's form is a list of prefixes; after "=" it is a list of full names, after "^" a list of exclusions.
    chosen = facts.environment.get("NCCL_SOCKET_IFNAME", "")
    names = chosen.lstrip("=").split(",")
    patterns = names if chosen.startswith("=") else [f"{name}*" for name in names]
    if chosen and chosen[0] != "^" and not any(fnmatch.filter(have, pattern) for pattern in patterns):
        yield Finding(
            BROKEN if facts.torch.sees_gpus > 1 else NOTE,
            f"NCCL_SOCKET_IFNAME={chosen}, but this machine has {', '.join(have)}",
            "unset NCCL_SOCKET_IFNAME",
        )


def _loopback(facts: Facts) -> Iterator[Finding]:
    if facts.torch.error:
        return
    if not facts.torch.backends.get("gloo"):
        yield Finding(BROKEN, "this torch has no gloo: CPU ranks cannot talk", "pip install --force-reinstall torch")
    elif facts.network.loopback_error:
        yield Finding(
            BROKEN,
            f"two gloo ranks on this machine could not add up: {facts.network.loopback_error}",
            f"export GLOO_SOCKET_IFNAME={_loopback_name(facts)}  # one machine; several: their common interface",
        )


def _threads(facts: Facts) -> Iterator[Finding]:
    threads = facts.torch.threads
    cores = max(1, math.floor(facts.machine.usable_cores))
    if "OMP_NUM_THREADS" in facts.environment or facts.torch.error:
        if threads > cores:
            yield Finding(
                SLOW,
                f"OMP_NUM_THREADS={facts.environment.get('OMP_NUM_THREADS')} threads share {cores} cores",
                f"export OMP_NUM_THREADS={cores}  # divided by the ranks of this machine",
            )
        return
    if threads > cores:
        yield Finding(
            SLOW,
            f"torch takes {threads} threads, this process may use {cores} cores (a container's limit, which "
            "torch does not see)",
            f"export OMP_NUM_THREADS={cores}",
        )
    elif cores > 2 and not facts.torch.sees_gpus:
        yield Finding(
            NOTE,
            "OMP_NUM_THREADS is not set: torchrun then gives each rank one thread, whatever the cores",
            f"export OMP_NUM_THREADS={cores // 2}  # for 2 ranks: {cores} cores divided by the ranks",
        )


def _environment(facts: Facts) -> Iterator[Finding]:
    environment = facts.environment
    for name, (value, cost) in _SLOWING.items():
        if environment.get(name, "").upper() == value:
            yield Finding(SLOW, f"{name}={value}: {cost}", f"unset {name}")
    if environment.get("CUDA_DEVICE_MAX_CONNECTIONS"):
        value = environment["CUDA_DEVICE_MAX_CONNECTIONS"]
        yield Finding(
            NOTE,
            f"CUDA_DEVICE_MAX_CONNECTIONS={value} is not needed here: overlap does not depend on it",
            "unset CUDA_DEVICE_MAX_CONNECTIONS",
        )
    left = [name for name in _OF_TORCHRUN if name in environment]
    if left and "TORCHELASTIC_RUN_ID" not in environment:
        yield Finding(
            NOTE,
            f"{', '.join(f'{name}={environment[name]}' for name in left)} in a shell that torchrun has not "
            "started: a program run by itself would wait for other ranks",
            f"unset {' '.join(left)}",
        )
