"""`fused-megatron audit`: what the GPU kernels cost, on a machine without a GPU."""

from dataclasses import dataclass
from pathlib import Path

from fused_megatron.audit.cost_table import (
    Row,
    audit,
    broken_bars,
    cases,
    known_faults,
    table,
    versions,
    what_is_missing,
)
from fused_megatron.audit.kernels import OPS
from fused_megatron.audit.occupancy import LIMITS
from fused_megatron.checks import InputError


@dataclass(frozen=True)
class AuditArguments:
    """Compile the GPU kernels for A100, H100 and B200, run them emulated, and print what they cost."""

    op: str | None = None
    """One op, such as layer_norm; default: all."""
    arch: str | None = None
    """One architecture: sm_80, sm_90a or sm_100a; default: all."""
    quick: bool = False
    """One shape an op, bfloat16."""
    write: Path | None = None
    """Write the table with its explanation to this file (docs/kernel_ledger.md)."""


def run_audit(arguments: AuditArguments) -> int:
    """Print the table; 1 when a bar is broken, or nothing could be checked.

    Raises:
        InputError: an unknown op or architecture.
    """
    if arguments.op is not None and arguments.op not in OPS:
        raise InputError(f"op={arguments.op!r} must be one of: {'; '.join(OPS)}")
    if arguments.arch is not None and arguments.arch not in LIMITS:
        raise InputError(f"arch={arguments.arch!r} must be one of: {', '.join(LIMITS)}")
    missing = what_is_missing()
    for what in missing:
        print(f"cannot be checked here: {what}")
    if missing:
        return 1
    archs = [arguments.arch] if arguments.arch else list(LIMITS)
    rows = audit(cases(arguments.op, arguments.quick), archs)
    broken = broken_bars(rows)
    if arguments.write is not None:
        arguments.write.write_text(ledger(rows, archs))
        print(f"{arguments.write}: {len(rows)} kernels at their shapes")
    else:
        print(f"{versions()}; architectures {' / '.join(archs)}\n")
        print(table(rows))
        for line in known_faults(rows):
            print(f"known: {line}")
    for line in broken:
        print(f"broken bar: {line}")
    return 1 if broken else 0


def ledger(rows: list[Row], archs: list[str]) -> str:
    """docs/kernel_ledger.md."""
    faults = "".join(f"- {line}\n" for line in known_faults(rows)) or "None.\n"
    return f"""# What each GPU kernel costs

Made by `fused-megatron audit --write docs/kernel_ledger.md` on a machine without a GPU; a test keeps it true.
Compilers: {versions()}. Architectures: {" / ".join(archs)}; where their figures differ they stand side by side.

- **registers** a thread, **spilled** bytes, **shared** bytes a block: of the compiled code. **occupancy**: resident
  warps over the most there can be, by registers, shared memory and block size.
- **loads, stores**: instructions of the machine code that access global memory, by width in bits.
- **bytes / bound**: what the whole direction asks of global memory, over its inputs once and its outputs once.
  CUDA kernels: counted while they run on the host, 8192 tokens on 132 multiprocessors, an access of a warp at a
  time; what several of its lanes ask for counts once, what a later access asks for again counts again. Triton kernels:
  elements that programs load and store in the interpreter, masked ones left out.
- **partials**: the share in it of partial sums of parameter gradients, written and read once more.
- widths: hidden size (the gated activations read twice as much), or columns of a vocabulary shard.

Bars: nothing spilled; 128-bit loads and stores; at most 1.02 times the bound beside partial sums, and those at most 2%.

## Broken bars and why

{faults}
## Kernels

{table(rows)}"""
