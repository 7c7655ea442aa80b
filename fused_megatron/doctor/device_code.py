"""GPU architectures of a compiled library, read from its fat binaries without a CUDA toolkit."""

import mmap
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

# A fat binary has a header (magic, version, header size, size of the rest) and entries, each with its own header.
# NVIDIA does not document the entries: this is the layout that nvcc 13.0 writes.
_MAGIC = struct.pack("<I", 0xBA55ED50)
_PTX, _MACHINE_CODE = 1, 2
_SUFFIXES = {1: "a", 2: "f"}  # bits 20 and 21 of the flags: code for this architecture only, for its family only


def device_code(library: Path) -> tuple[str, ...]:
    """Return the architectures of a library's GPU code, such as ("sm_80", "sm_90a", "ptx_100"); () for none."""
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


def toolkit_release(library: Path) -> str | None:
    """Return the release of the CUDA toolkit that compiled a library's GPU code, such as "13.0"; None for none."""
    if not library.stat().st_size:
        return None
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = re.search(rb"Cuda compilation tools, release (\d+\.\d+)", data)
        return found[1].decode() if found else None


def _entries(data: mmap.mmap, at: int, end: int) -> Iterable[tuple[int, int, str]]:
    while at + 48 <= end:
        kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
        if kind not in (_PTX, _MACHINE_CODE) or header < 48:
            return  # these bytes equal the magic number by chance
        (arch,) = struct.unpack_from("<I", data, at + 28)
        (flags,) = struct.unpack_from("<Q", data, at + 40)
        yield kind, arch, _SUFFIXES.get(flags >> 20 & 3, "")
        at += header + size


def runs_on(codes: Sequence[str], capability: str) -> str | None:
    """Return the code that a GPU of this compute capability ("9.0") runs, machine code before PTX; None for none."""
    major, minor = (int(part) for part in capability.split("."))
    fitting = []
    for code in codes:
        kind, arch, suffix = re.fullmatch(r"(sm|ptx)_(\d+)([af]?)", code).groups()  # type: ignore[union-attr]
        wanted = divmod(int(arch), 10)
        runs = {
            "a": wanted == (major, minor),
            "f": wanted[0] == major and wanted[1] <= minor,
            "": wanted[0] == major and wanted[1] <= minor if kind == "sm" else wanted <= (major, minor),
        }[suffix]
        if runs:
            fitting.append((kind == "sm", wanted, code))
    return max(fitting)[2] if fitting else None
