"""What the doctor looks at, as plain data: gathered once, judged and shown without another look."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Package:
    """A distribution that we ask for.

    Attributes:
        name, minimum: as our metadata asks: "torch", "2.13".
        installed: its version; None where it is not.
        extra: the optional part of ours that asks for it; None where all do.
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
    """Attributes:
    version: ours; None where neither metadata nor pyproject.toml tells.
    checkout: the folder of the source checkout that the package lies in, if it does.
    """

    version: str | None
    python: str
    platform: str
    checkout: str | None
    packages: tuple[Package, ...] = ()


@dataclass(frozen=True)
class Torch:
    """Attributes:
    error: why it does not import; the rest is empty then.
    build: "CPU", "CUDA 13.0", "ROCm 7.0".
    backends: which of torch.distributed's are built in, by name.
    sees_gpus: how many GPUs it can use.
    threads: of one op on the CPU.
    """

    error: str | None = None
    build: str = ""
    backends: dict[str, bool] = field(default_factory=dict)
    sees_gpus: int = 0
    threads: int = 0


@dataclass(frozen=True)
class OpKernels:
    """What runs an op: "kernel" or "reference" on the CPU; "CUDA", "Triton" or "reference" on a GPU."""

    op: str
    cpu: str
    gpu: str


@dataclass(frozen=True)
class Library:
    """The compiled library.

    Attributes:
        exists, loads: whether the file is there, and torch has loaded it.
        reason: why it is not loaded.
        device_code: what GPU code it holds: "sm_80", "sm_90a", "ptx_100".
        changed_since: a source file that is newer than it.
    """

    path: str
    exists: bool
    loads: bool
    reason: str = ""
    device_code: tuple[str, ...] = ()
    changed_since: str | None = None
    ops: tuple[OpKernels, ...] = ()


@dataclass(frozen=True)
class Tools:
    """Compilers; None where there is none that works.

    Attributes:
        cxx: the C++20 compiler's own first line.
        cc: path of the C compiler that Triton needs at run time.
        nvcc, nvcc_release: path, and "13.0".
    """

    cxx: str | None = None
    cc: str | None = None
    nvcc: str | None = None
    nvcc_release: str | None = None


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: str  # "9.0"
    memory_gb: float


@dataclass(frozen=True)
class Machine:
    """Attributes:
    vector_units: what the processor has of "AVX2", "AVX-512", "AMX", ..
    cores, usable_cores: of the machine; of this process (affinity and container limit).
    memory_gb, available_gb, shared_memory_gb: RAM (or the container's limit), free of it, size of /dev/shm.
    gpus, driver: as the driver tells, whatever torch sees.
    links: GPU pairs by kind of link, "NV18": NVLink; "SYS", "PHB", ..: PCIe.
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


@dataclass(frozen=True)
class Network:
    """Attributes:
    interfaces: address by name, "" for one without.
    host_addresses: what the host's own name resolves to; local_addresses: those of them that are this machine's.
    host_lookup_s, localhost_lookup_s: how long the name server took to tell those, and the name of 127.0.0.1;
        None: no answer in the time that the doctor waits.
    loopback_error: why two gloo ranks on this machine could not add up; None where they did.
    loopback_ms: how long they took; None where it was not tried.
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
class TokenFile:
    """A dataset that was compared with its checksums.

    Attributes:
        prefix, num_bytes: of its .bin file.
        problem: what is wrong with it; None where nothing is known to be.
        has_digest: whether there are checksums beside it.
        is_read: all of it; of a cache the doctor reads for some seconds only.
        in_cache: it was prepared from text, and can be again.
    """

    prefix: str
    num_bytes: int
    problem: str | None = None
    has_digest: bool = True
    is_read: bool = True
    in_cache: bool = False


@dataclass(frozen=True)
class Facts:
    installation: Installation
    torch: Torch
    library: Library
    tools: Tools
    machine: Machine
    network: Network
    environment: dict[str, str] = field(default_factory=dict)
    tokens: tuple[TokenFile, ...] = ()


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"; for comparisons, trailing zeros dropped."""
    found: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
    while found and found[-1] == 0:
        found.pop()
    return tuple(found)
