"""Triton kernels as their launchers would launch them on a GPU, compiled for GPUs that are not there.

A process of its own, in which the launchers serve CPU tensors; triton_code() starts it.

    python -m fused_megatron.audit.triton_launches ARCH,ARCH OP WIDTH DTYPE [OP WIDTH DTYPE ..]

prints one JSON object: for each of the three, the steps' launches.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fused_megatron.audit.kernels import DTYPES, OPS, TOKENS
from fused_megatron.audit.machine_code import Code, parsed_resources, read_code, tool
from fused_megatron.audit.triton_compiler import triton_source
from fused_megatron.ops.registration import TRITON_LAUNCHERS

_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One launch that was caught before it started."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class CompiledLaunch:
    """What it became."""

    step: str
    kernel: str
    arch: str
    threads: int  # of a block
    code: Code


def triton_code(cases: list[tuple[str, int, str]], archs: list[str]) -> list[list[CompiledLaunch]]:
    """The compiled launches of each (op, width, dtype), in the order of their launch.

    Raises:
        AssertionError: the process failed, with what it said.
    """
    environment = {**os.environ, "FUSED_MEGATRON_LIBRARY": ""}
    environment.pop("TRITON_INTERPRET", None)
    words = [",".join(archs), *(str(word) for case in cases for word in case)]
    command = [sys.executable, "-W", "ignore", "-m", __name__, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"compiling Triton kernels failed:\n{done.stderr[-4000:]}"
    return [[_from_json(launch) for launch in launches] for launches in json.loads(done.stdout.splitlines()[-1])]


def _from_json(launch: dict[str, Any]) -> CompiledLaunch:
    code = launch.pop("code")
    for name in ("load_widths", "store_widths"):
        code[name] = {int(bits): count for bits, count in code[name].items()}
    return CompiledLaunch(**launch, code=Code(**code))


def launches_of(op: str, width: int, dtype: str) -> dict[str, list[Launch]]:
    """The launches of each direction; nothing runs, and the tensors' pages are never touched."""
    entry = OPS[op]
    found: dict[str, list[Launch]] = {}
    for step in entry.steps(TOKENS, width, DTYPES[dtype]):
        with _caught() as launches:
            step.run()
        found[step.name] = launches
    return found


@contextlib.contextmanager
def _caught() -> Iterator[list[Launch]]:
    from triton.runtime.jit import JITFunction  # noqa: PLC0415  triton is optional in `testing`

    launches: list[Launch] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments |= {name: value for name, value in kwargs.items() if name in self.arg_names}
        launches.append(Launch(self, arguments, {k: v for k, v in kwargs.items() if k in _OPTIONS}))

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def compiled_code(launch: Launch, arch: str) -> Code:
    """Registers, spills and widths of a launch compiled for an architecture such as "sm_90a"."""
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    number = int(re.sub(r"\D", "", arch))
    source = triton_source(launch.kernel, launch.arguments)
    compiled = triton.compile(source, target=GPUTarget("cuda", number, 32), options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [str(tool("cuobjdump")), "-res-usage", str(cubin)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        ((symbol, resources),) = parsed_resources(said).items()
        code = read_code(cubin, symbol, resources, arch)
    # Shared memory is asked for at launch, so that the machine code does not know of it.
    shared = int(compiled.metadata.shared)
    return Code(code.registers, code.spilled_bytes, shared, code.load_widths, code.store_widths)


def main(words: list[str]) -> None:
    """Entry point of the process."""
    for name, launcher in TRITON_LAUNCHERS.items():
        torch.library.impl(f"fused_megatron::{name}", "cpu", launcher)
    results = []
    with contextlib.redirect_stdout(sys.stderr):
        for op, width, dtype in zip(*[iter(words[1:])] * 3, strict=True):
            compiled = []
            for step, launches in launches_of(op, int(width), dtype).items():
                for launch in launches:
                    for arch in words[0].split(","):
                        code = compiled_code(launch, arch)
                        threads = 32 * int(launch.options.get("num_warps", 4))
                        compiled.append(asdict(CompiledLaunch(step, launch.kernel.__name__, arch, threads, code)))
            results.append(compiled)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
