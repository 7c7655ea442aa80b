"""Ahead-of-time compilation of Triton kernels, without a GPU, and the resources of the compiled code."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_megatron.audit.instruction_path import listing
from fused_megatron.audit.machine_code import tool
from fused_megatron.checks import dtype_name


@dataclass(frozen=True)
class CompiledKernel:
    """Resources of a kernel, from ptxas and the PTX."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    global_accesses: tuple[str, ...]  # one entry per ld/st.global in the PTX: "ld.v4.b32", "st.b32", ...
    code: str = ""  # the machine code (instruction_path.listing), if cuobjdump is here


def compile_for(
    kernel: Any,
    arch: int,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    aligned: tuple[str, ...],
    num_warps: int,
    num_ctas: int = 1,
    maxnreg: int | None = None,
) -> CompiledKernel:
    """Compile a triton.jit function for a CUDA architecture.

    Args:
        kernel: the triton.jit function.
        arch: 80 (A100), 90 (H100), 100 (B200).
        signature: Triton type of each argument that is not a constexpr: "*bf16", "*i64", "i32", "fp32".
        constexprs: value of each constexpr.
        aligned: arguments that are multiples of 16 (pointers: of 16 bytes); a launch would detect them.
        num_warps: as in the launch.
        num_ctas: as in the launch; more than 1 (a cluster of blocks) needs arch 90 or 100.
        maxnreg: as in the launch; the limit of registers.
    """
    # Imported here: triton is optional, and only an audit needs it.
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
    options = {"num_warps": num_warps, "num_ctas": num_ctas, "maxnreg": maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spill_bytes = _resources(compiled.asm["ptx"], arch)
    accesses = re.findall(r"\b(ld|st)\.global(?:\.[\w:]+)*?((?:\.v\d)?\.[bfsu]\d+)\b", compiled.asm["ptx"])
    # Shared memory is requested at launch, so that ptxas does not report it.
    shared_bytes = compiled.metadata.shared
    widths = tuple("".join(access) for access in accesses)
    return CompiledKernel(registers, spill_bytes, shared_bytes, widths, _machine_code(compiled, arch))


def _machine_code(compiled: Any, arch: int) -> str:
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        return ""
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        return listing(file, f"sm_{arch}" + ("a" if arch >= 90 else ""), compiled.metadata.name, cuobjdump)


def _resources(ptx: str, arch: int) -> tuple[int, int]:
    """Return (registers, spilled bytes), as reported by ptxas -v."""
    import triton  # noqa: PLC0415

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = folder / ("ptxas-blackwell" if arch >= 90 else "ptxas")  # the older one does not support this PTX
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "kernel.ptx"
        file.write_text(ptx)
        name = f"sm_{arch}" + ("a" if arch >= 90 else "")
        command = [str(ptxas), "-v", f"-arch={name}", str(file), "-o", str(Path(work) / "kernel.cubin")]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, output)
        return int(found.group(1)) if found else 0

    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return number(r"Used (\d+) registers"), spilled


_POINTEES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int64": "i64", "int32": "i32", "uint8": "u8"}
_POINTEES |= {"bool": "i1", "int8": "i8", "float64": "fp64"}


def triton_source(kernel: Any, arguments: Mapping[str, Any]) -> Any:
    """Return the source that a launch with these arguments compiles, specialised as by Triton (types, alignment, 1)."""
    from triton.compiler import ASTSource  # noqa: PLC0415

    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments.get(parameter.name, parameter.default if parameter.has_default else None)
        kind, constant, multiple_of_16 = _specialised(value, parameter)
        signature[parameter.name] = kind
        if constant:
            constexprs[(index,)] = value
        if multiple_of_16:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def _specialised(value: Any, parameter: Any) -> tuple[str, bool, bool]:
    """Return (type, whether it is a constant, whether it is a multiple of 16) of an argument."""
    if parameter.is_constexpr or value is None:
        return "constexpr", True, False
    if hasattr(value, "data_ptr"):
        pointee = _POINTEES[dtype_name(value.dtype)]
        return f"*{pointee}", False, value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "u1", False, False
    if isinstance(value, float):
        return "fp32", False, False
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr", True, False
    wide = not -(2**31) <= value < 2**31
    return ("i64" if wide else "i32"), False, value % 16 == 0 and not parameter.do_not_specialize
