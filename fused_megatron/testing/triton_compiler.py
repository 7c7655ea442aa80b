"""Triton kernels compiled ahead of time for GPUs that are not there, and what the compiler made of them."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CompiledKernel:
    """What ptxas and the PTX say about a kernel."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    global_accesses: tuple[str, ...]  # one entry for each ld/st.global in the PTX: "ld.v4.b32", "st.b32", ...


def compile_for(
    kernel: Any,
    arch: int,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    aligned: tuple[str, ...],
    num_warps: int,
    num_ctas: int = 1,
) -> CompiledKernel:
    """Compile a triton.jit function for a CUDA architecture.

    Args:
        kernel: the triton.jit function.
        arch: 80 (A100), 90 (H100), 100 (B200).
        signature: Triton type of each argument that is no constexpr: "*bf16", "*i64", "i32", "fp32".
        constexprs: value of each constexpr.
        aligned: arguments that are multiples of 16 (pointers: of 16 bytes), as a launch would find.
        num_warps: as in the launch.
        num_ctas: as in the launch; more than 1 (a cluster of blocks) needs arch 90 or 100.
    """
    # triton is no dependency of `testing`: only those who audit kernels need it.
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    names = list(kernel.arg_names)
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_ctas": num_ctas}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spill_bytes = _resources(compiled.asm["ptx"], arch)
    accesses = re.findall(r"\b(ld|st)\.global(?:\.[\w:]+)*?((?:\.v\d)?\.[bfsu]\d+)\b", compiled.asm["ptx"])
    # Shared memory is asked for at launch, so that ptxas does not know of it.
    shared_bytes = compiled.metadata.shared
    return CompiledKernel(registers, spill_bytes, shared_bytes, tuple("".join(access) for access in accesses))


def _resources(ptx: str, arch: int) -> tuple[int, int]:
    """(registers, spilled bytes) as ptxas -v tells them."""
    import triton  # noqa: PLC0415

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = folder / ("ptxas-blackwell" if arch >= 90 else "ptxas")  # the older one does not know PTX this new
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "kernel.ptx"
        file.write_text(ptx)
        name = f"sm_{arch}" + ("a" if arch >= 90 else "")
        command = [str(ptxas), "-v", f"-arch={name}", str(file), "-o", str(Path(work) / "kernel.cubin")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        return int(found.group(1)) if found else 0

    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return number(r"Used (\d+) registers"), spilled
