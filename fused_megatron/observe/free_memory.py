"""Total and free memory of this machine or container."""

import os
import re
from pathlib import Path

# Files of both versions of control groups: limit, usage, and within the usage the file cache, which can be freed.
_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "file", "shmem"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_cache",
        "total_shmem",
    ),
)


def memory_bytes(root: Path = Path("/")) -> tuple[float, float]:
    """Return total and free bytes of RAM, or of the container if its limit is lower; outside Linux all is free.

    Args:
        root: the folder that contains proc and sys.
    """
    pages = {name: os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES") if name in os.sysconf_names}
    total = float(pages.get("SC_PAGE_SIZE", 0) * pages.get("SC_PHYS_PAGES", 0))
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"))
    available = float(found[1]) * 1024 if found else total
    for limit, used, details, cache, shared in _GROUPS:
        folder = root / "sys/fs/cgroup"
        limited = _read(folder / limit).strip()
        if limited.isdigit() and int(limited) < total:
            counts = dict(re.findall(r"^(\w+) (\d+)$", _read(folder / details), re.MULTILINE))
            reclaimable = max(0, int(counts.get(cache, 0)) - int(counts.get(shared, 0)))
            taken = max(0, int(_read(folder / used).strip() or 0) - reclaimable)
            return float(limited), min(available, float(limited) - taken)
    return total, available


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
