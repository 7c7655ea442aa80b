"""The command `fused-megatron audit`: costs of the GPU kernels, found on a machine without a GPU."""

from dataclasses import dataclass
from pathlib import Path

from fused_megatron.audit.cost_table import (
    Row,
    audit,
    cases,
    exceeded_limits,
    known_faults,
    table,
    versions,
    what_is_missing,
)
from fused_megatron.audit.kernels import OPS
from fused_megatron.audit.occupancy import BANDWIDTHS, LIMITS
from fused_megatron.checks import InputError
from fused_megatron.terminal_tables import print_report


@dataclass(frozen=True)
class AuditArguments:
    """Compile the GPU kernels for A100, H100 and B200, run them in emulation, and print their costs.

    Another use: audit --step CONFIG.toml counts the kernels of a whole training step (audit --step --help).
    """

    op: str | None = None
    """One op, for example layer_norm; default: all."""
    arch: str | None = None
    """One architecture: sm_80, sm_90a or sm_100a; default: all."""
    quick: bool = False
    """One shape per op, bfloat16."""
    write: Path | None = None
    """Write the table with its explanation to this file (docs/kernel_ledger.md)."""


def run_audit(arguments: AuditArguments) -> int:
    """Print the table. Return 1 if a limit is exceeded or something is missing, else 0.

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
    exceeded = exceeded_limits(rows)
    if arguments.write is not None:
        arguments.write.write_text(ledger(rows, archs))
        print(f"{arguments.write}: {len(rows)} kernels at their shapes")
    else:
        print(f"{versions()}; architectures {' / '.join(archs)}\n")
        print_report(table(rows))
        for line in known_faults(rows):
            print(f"known: {line}")
    for line in exceeded:
        print(f"exceeded limit: {line}")
    return 1 if exceeded else 0


def _bandwidths() -> str:
    return " / ".join(", ".join(f"{bandwidth:g}" for bandwidth in of_arch) for of_arch in BANDWIDTHS.values())


def _instruction_limits() -> str:
    return "; ".join(
        f"{op} " + ", ".join(f"{step} {limit:g}" for step, limit in entry.instructions.items())
        for op, entry in OPS.items()
        if entry.instructions
    )


def ledger(rows: list[Row], archs: list[str]) -> str:
    """Return the text of docs/kernel_ledger.md."""
    faults = "".join(f"- {line}\n" for line in known_faults(rows)) or "None.\n"
    return f"""# Costs of each GPU kernel

Made by `fused-megatron audit --write docs/kernel_ledger.md` on a machine without a GPU; a test keeps it up to date.
Compilers: {versions()}. Architectures: {" / ".join(archs)}; figures that differ between them are separated by " / ".

- **registers** per thread, **spilled** bytes, **shared** bytes per block: from the compiled code. **occupancy**:
  resident warps / maximum warps, limited by registers, shared memory and block size.
- **loads, stores**: instructions of the machine code that access global memory, by width in bits.
- **bytes / bound**: bytes of global memory that the whole direction accesses / bytes of its inputs and outputs, each
  counted once. CUDA kernels are counted while they run on the host, with 8192 tokens and 132 multiprocessors, one
  access of a warp at a time: bytes that several lanes access count once; bytes that a later access repeats count again.
  Triton kernels: elements that programs load and store in the interpreter, without masked elements.
- **instructions**: that a thread issues for an element of the output (adamw and sum_of_squares: of the weight) in the
  main loop, with the fixed part of a row: the length of the path through the machine code that makes the accesses of a
  full row (`fused_megatron/audit/instruction_path.py`). "-": no such path, or a kernel that moves few bytes.
- **issue slots**: the share of its issue slots (4 instructions of a warp in a clock) that a multiprocessor needs to
  move the bytes of the kernel at full bandwidth: A100 / H100, H200 / B200, with {_bandwidths()}
  bytes per clock and multiprocessor. Above about 0.6 (16 warps that wait for each other) or 0.75 (32 free warps)
  instructions limit the speed, not the memory.
- **partials**: the part of bytes / bound for partial sums of parameter gradients, which are written and read once more.
- widths: the hidden size (gated activations read twice as much), or the columns of a vocabulary shard. adamw and
  sum_of_squares: the columns of a weight with 64 rows.

Limits: nothing spilled; 128-bit loads and stores; at most 1.02 times the bound without partial sums; partial sums at
most 2% of the bound; instructions (bf16 on sm_90a) at most: {_instruction_limits()}.

## Exceeded limits and reasons

{faults}
## Kernels

{table(rows)}"""
