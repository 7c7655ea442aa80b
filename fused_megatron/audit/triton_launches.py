"""Compilation of Triton kernels exactly as their launchers would launch them on a GPU, without a GPU.

It runs in a process of its own, which triton_code() starts and in which the launchers take CPU tensors:

    python -m fused_megatron.audit.triton_launches ARCH,ARCH OP WIDTH DTYPE [OP WIDTH DTYPE ..]

prints one line of JSON: for each (OP, WIDTH, DTYPE) a list of CompiledLaunch.
"""

import contextlib
import dataclasses
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

from fused_megatron.audit.instruction_path import InstructionPath
from fused_megatron.audit.kernels import DTYPES, OPS, TOKENS
from fused_megatron.audit.machine_code import Code, parsed_resources, read_code, tool
from fused_megatron.audit.triton_compiler import triton_source
from fused_megatron.ops.registration import TRITON_LAUNCHERS
from fused_megatron.optional_packages import install_command

_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One launch, recorded instead of being run."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class CompiledLaunch:
    """A launch, compiled for one architecture."""

    step: str
    kernel: str
    arch: str
    threads: int  # per block
    code: Code


def triton_code(cases: list[tuple[str, int, str]], archs: list[str]) -> list[list[CompiledLaunch]]:
    """Return the compiled launches of each (op, width, dtype), in the order of the launches.

    Raises:
        AssertionError: the process failed; with its error output.
    """
    environment = {**os.environ, "FUSED_MEGATRON_LIBRARY": ""}
    environment.pop("TRITON_INTERPRET", None)
    arguments = [",".join(archs), *(str(value) for case in cases for value in case)]
    command = [sys.executable, "-W", "ignore", "-m", __name__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"compiling Triton kernels failed:\n{done.stderr[-4000:]}"
    return [[_from_json(launch) for launch in launches] for launches in json.loads(done.stdout.splitlines()[-1])]


def _from_json(launch: dict[str, Any]) -> CompiledLaunch:
    code = launch.pop("code")
    for name in ("load_widths", "store_widths"):
        code[name] = {int(bits): count for bits, count in code[name].items()}
    code["paths"] = tuple(InstructionPath(**path) for path in code["paths"])
    return CompiledLaunch(**launch, code=Code(**code))


def launches_of(op: str, width: int, dtype: str) -> dict[str, list[Launch]]:
    """Return the launches of each direction; no kernel runs, and the tensors' pages are never touched."""
    entry = OPS[op]
    found: dict[str, list[Launch]] = {}
    for step in entry.steps(TOKENS, width, DTYPES[dtype]):
        with _recorded() as launches:
            step.run()
        found[step.name] = launches
    return found


@contextlib.contextmanager
def _recorded() -> Iterator[list[Launch]]:
    from triton.runtime.jit import JITFunction  # noqa: PLC0415  triton is optional

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
    """Compile a launch for an architecture, for example "sm_90a"; return its registers, spills and widths."""
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    number = int(re.sub(r"\D", "", arch))
    source = triton_source(launch.kernel, launch.arguments)
    compiled = triton.compile(source, target=GPUTarget("cuda", number, 32), options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [str(tool("cuobjdump")), "-res-usage", str(cubin)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        ((symbol, resources),) = parsed_resources(output).items()
        code = read_code(cubin, symbol, resources, arch)
    # Shared memory is requested at launch, so that the machine code does not contain its size.
    shared = int(compiled.metadata.shared)
    return dataclasses.replace(code, shared_bytes=shared)


def main(arguments: list[str]) -> None:
    """Entry point of the process."""
    for name, launcher in TRITON_LAUNCHERS.items():
        torch.library.impl(f"fused_megatron::{name}", "cpu", launcher)
    results = []
    with contextlib.redirect_stdout(sys.stderr):
        for op, width, dtype in zip(*[iter(arguments[1:])] * 3, strict=True):
            compiled = []
            for step, launches in launches_of(op, int(width), dtype).items():
                for launch in launches:
                    for arch in arguments[0].split(","):
                        code = compiled_code(launch, arch)
                        threads = 32 * int(launch.options.get("num_warps", 4))
                        compiled.append(asdict(CompiledLaunch(step, launch.kernel.__name__, arch, threads, code)))
            results.append(compiled)
    print(json.dumps(results))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ModuleNotFoundError as error:
        sys.exit(f"fused-megatron: error: {error} ({install_command('triton')})")
