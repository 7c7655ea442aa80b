"""Facts about the buses of the machine: memory nodes of GPUs, and InfiniBand cards, as Linux shows them in /sys."""

from collections.abc import Iterable
from pathlib import Path

from fused_megatron.doctor.facts import Buses


def find_buses(gpu_addresses: Iterable[str], sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> Buses:
    """Read the memory node of each GPU, and the ports of InfiniBand and RoCE cards.

    Args:
        gpu_addresses: bus addresses as nvidia-smi prints them, such as "00000000:1B:00.0".
        sys, proc: the mounted file systems of the kernel.
    """
    nodes = [path for path in sys.glob("devices/system/node/node*") if path.name.removeprefix("node").isdigit()]
    return Buses(
        numa_nodes=max(1, len(nodes)),
        gpu_nodes={address: _node(sys, address) for address in gpu_addresses},
        infiniband=tuple(_ports(sys)),
        peer_memory=any(line.startswith("nvidia_peermem ") for line in _read(proc / "modules").splitlines()),
    )


def _node(sys: Path, address: str) -> int:
    """Return the memory node of a GPU; -1 if the system does not say."""
    domain, _, rest = address.lower().partition(":")
    # nvidia-smi writes the domain with 8 digits, Linux with 4 or as many as it needs.
    text = _read(sys / "bus" / "pci" / "devices" / f"{domain[-8:].lstrip('0'):0>4}:{rest}" / "numa_node")
    return int(text) if text.lstrip("-").isdigit() else -1


def _ports(sys: Path) -> Iterable[str]:
    for port in sorted(sys.glob("class/infiniband/*/ports/*")):
        state = _read(port / "state").partition(":")[2].strip() or "unknown state"
        rate = _read(port / "rate").partition("(")[0].strip() or "unknown rate"
        yield f"{port.parts[-3]}/{port.name}: {state}, {rate}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
