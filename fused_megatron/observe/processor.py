"""Name and instruction sets of this machine's processor."""

import re
from pathlib import Path


def processor_name() -> str:
    """Return the processor's product name; "" if the system does not report it."""
    return processor_name_and_flags()[0]


def processor_name_and_flags() -> tuple[str, set[str]]:
    """Return processor_name and the instruction sets as named in /proc/cpuinfo; outside Linux ("", set())."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", set()
    found = dict(re.findall(r"^(model name|flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE))
    return found.get("model name", ""), set((found.get("flags") or found.get("Features") or "").split())
