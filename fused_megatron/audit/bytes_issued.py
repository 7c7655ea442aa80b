"""Bytes that kernels load and store, counted while the emulation or the interpreter runs them.

The emulation or the interpreter must be chosen before anything is imported. So the count runs in a process of its own,
which count_bytes() starts:

    python -m fused_megatron.audit.bytes_issued OP WIDTH DTYPE [OP WIDTH DTYPE ..]

prints one line of JSON: for each (OP, WIDTH, DTYPE) a list of StepCounts.
"""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

from fused_megatron.audit.cuda_emulation import build_emulation, cuda_sources, loaded_emulation
from fused_megatron.audit.kernels import DTYPES, MULTIPROCESSORS, OPS, source_of
from fused_megatron.audit.triton_interpreter import interpreter
from fused_megatron.checks import InputError
from fused_megatron.optional_packages import install_command

# For wide rows only this many blocks of each grid run, and their count is scaled to the grid: all would take long.
_SAMPLED_BLOCKS = 6
_ALL_BLOCKS_TO_WIDTH = 1024


@dataclass(frozen=True)
class KernelCounts:
    """Bytes of one kernel. Widths: bytes by the width of a thread's access. Triton kernels have no widths or symbol."""

    name: str
    symbol: str
    threads: int
    dynamic_shared: int
    loaded: int
    stored: int
    load_widths: dict[str, int]
    store_widths: dict[str, int]


@dataclass(frozen=True)
class StepCounts:
    """Bytes of one direction of an op: issued by its kernels, and the lower bound."""

    step: str
    issued_bytes: int
    bound_bytes: int
    kernels: list[KernelCounts]


def count_bytes(cases: list[tuple[str, int, str]], *, timeout_s: float = 900.0) -> list[list[StepCounts]]:
    """Return the StepCounts of each (op, width, dtype); all ops must have the same language.

    Raises:
        AssertionError: the process failed; with its error output.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FUSED_MEGATRON_LIBRARY": ""}
    if OPS[cases[0][0]].language == "cuda":
        stems = {source_of(op) for op, *_ in cases}
        library = build_emulation([source for source in cuda_sources() if source.parent.name in stems])
        environment = {**os.environ, "FUSED_MEGATRON_LIBRARY": str(library)}
    arguments = [str(value) for case in cases for value in case]
    command = [sys.executable, "-W", "ignore", "-m", __name__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"counting bytes failed:\n{done.stderr[-4000:]}"
    return [
        [StepCounts(**{**step, "kernels": [KernelCounts(**k) for k in step["kernels"]]}) for step in steps]
        for steps in json.loads(done.stdout.splitlines()[-1])
    ]


def _count(op: str, width: int, dtype: str) -> list[StepCounts]:
    entry = OPS[op]
    counted = []
    for step in entry.steps(entry.rows, width, DTYPES[dtype]):
        if entry.language == "cuda":
            library = loaded_emulation()
            if library is None:
                raise InputError("bytes are counted in an emulation, which fused-megatron audit builds: run that")
            library.fm_emulation_set_multiprocessors(MULTIPROCESSORS)
            library.fm_emulation_set_sampled_blocks(_SAMPLED_BLOCKS if width > _ALL_BLOCKS_TO_WIDTH else 0)
            library.fm_emulation_count(True)
            step.run()
            kernels = _parsed(library.fm_emulation_counted().decode())
            library.fm_emulation_count(False)
        else:
            with interpreter() as accesses:
                step.run()
            names = sorted({kernel for kernel, _ in accesses.bytes})
            bytes_of = accesses.bytes.get
            kernels = [
                KernelCounts(name, "", 0, 0, bytes_of((name, "load"), 0), bytes_of((name, "store"), 0), {}, {})
                for name in names
            ]
        issued = sum(kernel.loaded + kernel.stored for kernel in kernels)
        counted.append(StepCounts(step.name, issued, step.bound_bytes, kernels))
    return counted


def _parsed(report: str) -> list[KernelCounts]:
    kernels = []
    lines = [line.split("\t") for line in report.splitlines()]
    for load, store in zip(lines[::2], lines[1::2], strict=True):
        widths = [{k: int(v) for k, v in (pair.split(":") for pair in line[8:])} for line in (load, store)]
        name, symbol, threads, dynamic = load[:4]
        kernels.append(KernelCounts(name, symbol, int(threads), int(dynamic), int(load[6]), int(store[6]), *widths))
    return kernels


def main(arguments: list[str]) -> None:
    """Entry point of the process."""
    cases = [(op, int(width), dtype) for op, width, dtype in zip(*[iter(arguments)] * 3, strict=True)]
    with contextlib.redirect_stdout(sys.stderr):
        results = [[asdict(step) for step in _count(*case)] for case in cases]
    print(json.dumps(results))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"fused-megatron: error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"fused-megatron: error: {error} ({install_command('triton')})")
