"""Start here when the reported free memory is wrong, above all in a container."""

from pathlib import Path

import pytest

from fused_megatron.observe.free_memory import memory_bytes


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_this_machine() -> None:
    total, available = memory_bytes()
    assert 0 < available <= total


@pytest.mark.parametrize(
    "group",
    [
        {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "anon 200\nfile 700\nshmem 100\n"},
        {
            "memory/memory.limit_in_bytes": "1000\n",
            "memory/memory.usage_in_bytes": "900\n",
            "memory/memory.stat": "cache 5\ntotal_cache 700\ntotal_shmem 100\n",
        },
    ],
    ids=["new", "old"],
)
def test_a_container(tmp_path: Path, group: dict[str, str]) -> None:
    write(tmp_path, {f"sys/fs/cgroup/{name}": content for name, content in group.items()})
    assert memory_bytes(tmp_path) == (1000, 700)  # the file cache can be freed, shared memory cannot
    write(tmp_path, {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:       0 kB\n"})
    assert memory_bytes(tmp_path) == (1000, 0)


def test_a_group_without_a_limit(tmp_path: Path) -> None:
    write(tmp_path, {"sys/fs/cgroup/memory.max": "max\n", "proc/meminfo": "MemAvailable:       3 kB\n"})
    assert memory_bytes(tmp_path)[1] == 3072
