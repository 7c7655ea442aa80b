"""The facts about an installation and its machine, as plain data."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Package:
    """A distribution that fused-megatron requires.

    Attributes:
        name: name in our metadata, such as "torch".
        minimum: lowest version, such as "2.13"; "" for any.
        installed: its version; None if it is not installed.
        extra: our optional part that requires it; None if it is always required.
    """

    name: str
    minimum: str
    installed: str | None
    extra: str | None = None

    @property
    def requirement(self) -> str:
        return f"{self.name}>={self.minimum}" if self.minimum else self.name

    @property
    def fits(self) -> bool:
        return self.installed is not None and numbers(self.installed) >= numbers(self.minimum)


@dataclass(frozen=True)
class Installation:
    """The installed package and its requirements.

    Attributes:
        version: our version; None if neither metadata nor pyproject.toml has it.
        python: version of Python.
        platform: system and processor architecture, such as "Linux x86_64".
        checkout: folder of the source checkout that holds the package; None if there is none.
        packages: our requirements.
    """

    version: str | None
    python: str
    platform: str
    checkout: str | None
    packages: tuple[Package, ...] = ()


@dataclass(frozen=True)
class Torch:
    """The installed torch.

    Attributes:
        error: why it cannot be imported (the other fields are then empty); None if it can.
        build: "CPU", "CUDA 13.0", "ROCm 7.0".
        backends: by name, whether a backend of torch.distributed is built in.
        sees_gpus: number of GPUs that it can use.
        threads: CPU threads of one op.
    """

    error: str | None = None
    build: str = ""
    backends: dict[str, bool] = field(default_factory=dict)
    sees_gpus: int = 0
    threads: int = 0


@dataclass(frozen=True)
class OpKernels:
    """The implementations of an op: "kernel" or "reference" on CPU; "CUDA", "Triton" or "reference" on GPU."""

    op: str
    cpu: str
    gpu: str


@dataclass(frozen=True)
class AttentionKernel:
    """The kernel of attention over documents, windows and context-parallel ranks.

    Attributes:
        inputs: device, dtype and options of a call.
        kernel: its name.
        reason: why such a call gets it.
    """

    inputs: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class Library:
    """The compiled library.

    Attributes:
        path: path of the file.
        exists: whether the file exists.
        loads: whether torch has loaded it.
        reason: why it is not loaded.
        device_code: architectures of its GPU code, such as "sm_80", "sm_90a", "ptx_100".
        toolkit: release of the CUDA toolkit that compiled this code, such as "13.0"; None if there is none.
        changed_since: a source file that is newer than the library; None if there is none.
        ops: the implementations of every op.
        attention: the kernels of attention, which are torch's.
    """

    path: str
    exists: bool
    loads: bool
    reason: str = ""
    device_code: tuple[str, ...] = ()
    changed_since: str | None = None
    ops: tuple[OpKernels, ...] = ()
    attention: tuple[AttentionKernel, ...] = ()
    toolkit: str | None = None


@dataclass(frozen=True)
class Tools:
    """Compilers; None for a compiler that is missing or does not work.

    Attributes:
        cxx: first line that the C++20 compiler prints about itself.
        cc: path of the C compiler that Triton needs at run time.
        nvcc: path of nvcc.
        nvcc_release: its release, such as "13.0".
    """

    cxx: str | None = None
    cc: str | None = None
    nvcc: str | None = None
    nvcc_release: str | None = None


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it.

    Attributes:
        name: its name.
        capability: compute capability, such as "9.0".
        memory_gb: memory in GB (10^9 bytes).
    """

    name: str
    capability: str
    memory_gb: float


@dataclass(frozen=True)
class Buses:
    """The place of GPUs and network cards in the machine.

    Attributes:
        numa_nodes: number of memory nodes.
        gpu_nodes: the node of each GPU, by bus address; -1 if the system does not say.
        infiniband: state and rate of each port of an InfiniBand or RoCE card, such as "mlx5_0/1: ACTIVE, 400 Gb/sec".
        peer_memory: whether the kernel module is loaded that lets such a card read a GPU's memory.
    """

    numa_nodes: int = 1
    gpu_nodes: dict[str, int] = field(default_factory=dict)
    infiniband: tuple[str, ...] = ()
    peer_memory: bool = False


@dataclass(frozen=True)
class Machine:
    """Processor, memory and GPUs.

    Attributes:
        cpu: name of the processor.
        vector_units: its vector units, such as "AVX2", "AVX-512", "AMX".
        cores: cores of the machine.
        usable_cores: cores that this process may use (affinity and container limit).
        memory_gb: RAM, or the container's limit, in GB.
        available_gb: free RAM in GB.
        shared_memory_gb: size of /dev/shm in GB; None if there is none.
        gpus: the GPUs that the driver sees; torch may see fewer.
        driver: version of the driver.
        links: number of GPU pairs by kind of link ("NV18": NVLink; "SYS", "PHB", ..: PCIe).
        driver_cuda: newest CUDA of the driver, such as "13.0"; None if it is not known.
        buses: memory nodes of the GPUs, and network cards.
    """

    cpu: str = ""
    vector_units: tuple[str, ...] = ()
    cores: int = 1
    usable_cores: float = 1
    memory_gb: float = 0
    available_gb: float = 0
    shared_memory_gb: float | None = None
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    links: dict[str, int] = field(default_factory=dict)
    driver_cuda: str | None = None
    buses: Buses = field(default_factory=Buses)


@dataclass(frozen=True)
class Network:
    """Network names, interfaces, and a trial of gloo.

    Attributes:
        hostname: name of the host.
        interfaces: address by name of the interface; "" for an interface without an address.
        host_addresses: addresses that the host's name resolves to.
        local_addresses: those host_addresses that belong to this machine.
        host_lookup_s: seconds to resolve the host's name; None: no answer while the doctor waited.
        localhost_lookup_s: seconds to find the name of 127.0.0.1; None: no answer while the doctor waited.
        loopback_error: why two gloo ranks on this machine failed to add numbers; None if they succeeded.
        loopback_ms: milliseconds that they took; None if it was not tried.
    """

    hostname: str = ""
    interfaces: dict[str, str] = field(default_factory=dict)
    host_addresses: tuple[str, ...] = ()
    local_addresses: tuple[str, ...] = ()
    host_lookup_s: float | None = 0.0
    localhost_lookup_s: float | None = 0.0
    loopback_error: str | None = None
    loopback_ms: float | None = None


@dataclass(frozen=True)
class OpTrial:
    """A call of an op on a GPU, forward and backward.

    Attributes:
        op: its name.
        error: largest error of its results, relative to the right values; None if it raised.
        problem: why it is wrong or raised; None if it is right.
    """

    op: str
    error: float | None
    problem: str | None = None


@dataclass(frozen=True)
class TwoRanks:
    """A trial of two ranks, each on a GPU of this machine.

    Attributes:
        gb_per_s: bus bandwidth of an all-reduce of 64 MiB, in 10^9 bytes per second; None if it failed.
        problem: why it failed; None if it succeeded.
        maps_memory: whether the ranks map each other's memory, for torch's fused products.
    """

    gb_per_s: float | None = None
    problem: str | None = None
    maps_memory: bool = False


@dataclass(frozen=True)
class GpuTrials:
    """Trials on the GPUs of this machine. Empty without a GPU.

    Attributes:
        ops: a call of each op.
        attention: the backend that torch gives to dense attention, by inputs.
        cudnn: version of cuDNN, such as "9.20.0"; None if torch has none.
        two_ranks: two ranks with NCCL; None on a machine with one GPU.
    """

    ops: tuple[OpTrial, ...] = ()
    attention: tuple[AttentionKernel, ...] = ()
    cudnn: str | None = None
    two_ranks: TwoRanks | None = None


@dataclass(frozen=True)
class TokenFile:
    """A dataset that was compared with its checksums.

    Attributes:
        prefix: path of its files without .bin and .idx.
        num_bytes: size of its .bin file.
        problem: the damage that was found; None if none was found.
        has_digest: whether it has checksums.
        is_read: whether all of it was read; the doctor reads a cache for some seconds only.
        in_cache: whether it is in the cache of prepared text, and so can be prepared again.
    """

    prefix: str
    num_bytes: int
    problem: str | None = None
    has_digest: bool = True
    is_read: bool = True
    in_cache: bool = False


@dataclass(frozen=True)
class Facts:
    """All facts; `environment` has the environment variables of diagnosis.VARIABLES that are set."""

    installation: Installation
    torch: Torch
    library: Library
    tools: Tools
    machine: Machine
    network: Network
    environment: dict[str, str] = field(default_factory=dict)
    tokens: tuple[TokenFile, ...] = ()
    gpu_trials: GpuTrials = field(default_factory=GpuTrials)


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version for comparisons, without trailing zeros: (2, 13) for "2.13.0+cpu"."""
    found: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
    while found and found[-1] == 0:
        found.pop()
    return tuple(found)
