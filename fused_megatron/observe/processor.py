"""The processor of this machine, as the system describes it."""

import re
from pathlib import Path


def processor_name() -> str:
    """The processor as its maker calls it; "" where the system does not say."""
    return processor_name_and_flags()[0]


def processor_name_and_flags() -> tuple[str, set[str]]:
    """(as processor_name, its instruction sets by the names of /proc/cpuinfo); Linux only, elsewhere ("", none)."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", set()
    found = dict(re.findall(r"^(model name|flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE))
    return found.get("model name", ""), set((found.get("flags") or found.get("Features") or "").split())
