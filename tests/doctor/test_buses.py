"""Start here when the doctor puts a GPU at the wrong memory node, or overlooks an InfiniBand card."""

from pathlib import Path

from fused_megatron.doctor.buses import find_buses
from fused_megatron.doctor.facts import Buses


def test_gpus_and_cards_of_two_nodes(tmp_path: Path) -> None:
    files = {
        "devices/system/node/node0/cpulist": "0-31",
        "devices/system/node/node1/cpulist": "32-63",
        "devices/system/node/possible": "0-1",
        "bus/pci/devices/0000:1b:00.0/numa_node": "0\n",
        "bus/pci/devices/0001:bc:00.0/numa_node": "1\n",
        "class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
        "class/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n",
        "class/infiniband/mlx5_1/ports/1/state": "1: DOWN\n",
    }
    for name, text in files.items():
        (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / name).write_text(text)
    (tmp_path / "modules").write_text("nvidia_uvm 1 0 - Live\nnvidia_peermem 16384 0 - Live 0x0\n")
    addresses = ["00000000:1B:00.0", "00000001:BC:00.0", "00000000:FF:00.0"]
    found = find_buses(addresses, tmp_path / "sys", tmp_path)
    assert found.numa_nodes == 2 and found.gpu_nodes == dict(zip(addresses, (0, 1, -1), strict=True))
    assert found.infiniband == ("mlx5_0/1: ACTIVE, 400 Gb/sec", "mlx5_1/1: DOWN, unknown rate")
    assert found.peer_memory


def test_a_machine_without_any(tmp_path: Path) -> None:
    assert find_buses([], tmp_path, tmp_path) == Buses()
