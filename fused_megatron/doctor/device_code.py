"""Which GPUs a compiled library has code for, read from the fat binaries in it; needs no CUDA toolkit."""

import mmap
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

# A fat binary: magic, version, header size, bytes that follow; then entries, each with a header of its own. Neither
# NVIDIA's documentation nor its headers describe the entries: this is what nvcc 13.0 writes.
_MAGIC = struct.pack("<I", 0xBA55ED50)
_PTX, _MACHINE_CODE = 1, 2
_SUFFIXES = {1: "a", 2: "f"}  # bits 20 and 21 of the flags: this processor alone, its family alone


def device_code(library: Path) -> tuple[str, ...]:
    """("sm_80", "sm_90a", "ptx_100") of what every kernel file of a library was compiled for; () for none."""
    if not library.stat().st_size:
        return ()
    found: set[tuple[int, int, str]] = set()
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(_MAGIC)
        while 0 <= at <= len(data) - 16:
            _, _, header, size = struct.unpack_from("<IHHQ", data, at)
            found.update(_entries(data, at + header, min(at + header + size, len(data))))
            at = data.find(_MAGIC, at + 4)
    names = {_PTX: "ptx", _MACHINE_CODE: "sm"}
    ordered = sorted(found, key=lambda entry: (-entry[0], entry[1:]))
    return tuple(f"{names[kind]}_{arch}{suffix}" for kind, arch, suffix in ordered)


def _entries(data: mmap.mmap, at: int, end: int) -> Iterable[tuple[int, int, str]]:
    while at + 48 <= end:
        kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
        if kind not in (_PTX, _MACHINE_CODE) or header < 48:
            return  # the magic stood there by chance
        (arch,) = struct.unpack_from("<I", data, at + 28)
        (flags,) = struct.unpack_from("<Q", data, at + 40)
        yield kind, arch, _SUFFIXES.get(flags >> 20 & 3, "")
        at += header + size


def runs_on(codes: Sequence[str], capability: str) -> str | None:
    """Which of the codes a GPU of a compute capability ("9.0") runs: machine code before PTX; None for none."""
    major, minor = (int(part) for part in capability.split("."))
    fitting = []
    for code in codes:
        kind, arch, suffix = re.fullmatch(r"(sm|ptx)_(\d+)([af]?)", code).groups()  # type: ignore[union-attr]
        wanted = divmod(int(arch), 10)
        alike = {
            "a": wanted == (major, minor),
            "f": wanted[0] == major and wanted[1] <= minor,
            "": wanted[0] == major and wanted[1] <= minor if kind == "sm" else wanted <= (major, minor),
        }[suffix]
        if alike:
            fitting.append((kind == "sm", wanted, code))
    return max(fitting)[2] if fitting else None
