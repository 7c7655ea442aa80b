"""Table of kernel costs: a row per kernel, architecture and shape; the limits; the Markdown table for docs."""

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from fused_megatron.audit import machine_code
from fused_megatron.audit.bytes_issued import KernelCounts, StepCounts, count_bytes
from fused_megatron.audit.cuda_emulation import CSRC, host_compiler
from fused_megatron.audit.instruction_path import instructions_per_element
from fused_megatron.audit.kernels import DTYPES, OPS, PARTIALS_LIMIT, RATIO_LIMIT, source_of
from fused_megatron.audit.occupancy import BANDWIDTHS, ISSUED_PER_CLOCK, LIMITS, occupancy
from fused_megatron.audit.triton_launches import CompiledLaunch, triton_code
from fused_megatron.optional_packages import install_command

Case = tuple[str, int, str]  # op, width, dtype


@dataclass(frozen=True)
class Row:
    """Costs of one kernel at one shape on one architecture.

    Attributes:
        ratio: bytes issued / bytes that must move, for the whole direction of the op.
        partials: the part of ratio for partial sums, which are written and read again.
        instructions: of a thread for an element; None where the main loop has no wide accesses.
        bytes: that the kernel moves for an element.
        limit: of instructions, or None.
        known: the reason why a limit may be exceeded here; "" if there is none.
    """

    op: str
    step: str
    kernel: str
    width: int
    dtype: str
    arch: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    occupancy: float
    load_bits: str
    store_bits: str
    ratio: float
    partials: float
    instructions: float | None = None
    bytes: float = 0.0
    limit: float | None = None
    known: str = ""

    @property
    def is_main(self) -> bool:
        """Whether widths matter: kernels that finish a sum over partial results move hardly any bytes."""
        return _is_main(self.kernel)

    @property
    def stores_much(self) -> bool:
        """Whether the widths of stores matter: a kernel that stores a few numbers a row or block has no wide ones."""
        return not any(part in self.kernel for part in ("statistics", "sum_of_squares"))

    @property
    def issue_slots(self) -> list[float]:
        """Issue slots needed at full bandwidth / all issue slots, on each GPU of the architecture."""
        if self.instructions is None:
            return []
        return [self.instructions * bandwidth / self.bytes / ISSUED_PER_CLOCK for bandwidth in BANDWIDTHS[self.arch]]

    def faults(self) -> list[str]:
        """Return a text for each limit that is exceeded."""
        faults = [f"{self.spilled_bytes} bytes spilled"] if self.spilled_bytes else []
        if self.is_main:
            stores = self.store_bits if self.stores_much else ""
            for name, bits in (("loads", self.load_bits), ("stores", stores)):
                if bits and not bits.startswith("128"):
                    faults.append(f"{name} of {bits.split('x')[0]} bits")
        if self.ratio - self.partials > RATIO_LIMIT:
            faults.append(f"{self.ratio - self.partials:.3f} times the bytes that must move (limit {RATIO_LIMIT})")
        if self.partials > PARTIALS_LIMIT:
            faults.append(f"partial sums take {self.partials:.1%} (limit {PARTIALS_LIMIT:.0%})")
        if self.limit is not None and (self.instructions is None or self.instructions > self.limit):
            faults.append(f"{_figure(self.instructions, 1)} instructions an element (limit {self.limit:g})")
        return faults


def _is_main(kernel: str) -> bool:
    return not any(part in kernel for part in ("finish", "merge"))


def cases(only_op: str | None = None, quick: bool = False) -> list[Case]:
    """Return the shapes of the audit; quick: one width per op, bfloat16."""
    chosen = []
    for op, entry in OPS.items():
        if only_op is not None and op != only_op:
            continue
        for width in entry.widths[1:2] if quick else entry.widths:
            chosen += [(op, width, dtype) for dtype in (["bf16"] if quick else DTYPES)]
    return chosen


def what_is_missing() -> list[str]:
    """Return a line for each missing tool: what cannot be checked, and what to install."""
    if not CSRC.exists():
        return ["the sources of the kernels: the audit needs a source checkout (git clone), not the wheel"]
    lacks = machine_code.missing()
    if host_compiler() is None:
        lacks.append("GCC on Linux, for the bytes that CUDA kernels issue: apt-get install g++")
    if importlib.util.find_spec("triton") is None:
        lacks.append(f"triton, for all figures of Triton kernels: {install_command('triton')}")
    return lacks


def versions() -> str:
    """Return the versions of the compilers."""
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    return f"nvcc {machine_code.nvcc_version() or 'none'}, Triton {triton}"


def audit(chosen: Sequence[Case], archs: Sequence[str] = tuple(LIMITS)) -> list[Row]:
    """Return the rows of the cases, in the order of the cases."""
    counts: dict[Case, list[StepCounts]] = {}
    for language in ("cuda", "triton"):
        of_language = [case for case in chosen if OPS[case[0]].language == language]
        if of_language:
            counts.update(zip(of_language, count_bytes(of_language), strict=True))
    triton = [case for case in chosen if OPS[case[0]].language == "triton"]
    launches = dict(zip(triton, triton_code(triton, list(archs)), strict=True)) if triton else {}
    rows: list[Row] = []
    for case in chosen:
        if case in launches:
            rows += _triton_rows(case, counts[case], launches[case])
        else:
            rows += _cuda_rows(case, counts[case], archs)
    return rows


def _cuda_rows(case: Case, steps: list[StepCounts], archs: Sequence[str]) -> list[Row]:
    rows = []
    for step in steps:
        for kernel in step.kernels:
            for arch in archs:
                code = machine_code.code_of(source_of(case[0]), arch, kernel.symbol)
                rows.append(_row(case, step, _short(kernel), arch, code, kernel.threads, kernel.dynamic_shared))
    return rows


def _triton_rows(case: Case, steps: list[StepCounts], launches: list[CompiledLaunch]) -> list[Row]:
    of_step = {step.step: step for step in steps}
    return [_row(case, of_step[x.step], x.kernel, x.arch, x.code, x.threads, 0) for x in launches]


def _row(
    case: Case, step: StepCounts, kernel: str, arch: str, code: machine_code.Code, threads: int, dynamic_shared: int
) -> Row:
    op, width, dtype = case
    entry = OPS[op]
    elements = entry.rows * width * entry.elements
    counts = next((k for k in step.kernels if elements and _is_main(kernel) and _short(k) == kernel), None)
    loaded, stored = (counts.loaded / elements, counts.stored / elements) if counts is not None else (0.0, 0.0)
    instructions = instructions_per_element(code.paths, loaded, stored, entry.thread_elements.get(dtype))
    shared = code.shared_bytes + dynamic_shared
    partials = 2 * sum(k.loaded for k in step.kernels if "finish" in k.name)
    return Row(
        op=op,
        step=step.step,
        kernel=kernel,
        width=width,
        dtype=dtype,
        arch=arch,
        registers=code.registers,
        spilled_bytes=code.spilled_bytes,
        shared_bytes=shared,
        occupancy=occupancy(arch, threads, code.registers, shared),
        load_bits=_bits(code.load_widths),
        store_bits=_bits(code.store_widths),
        ratio=step.issued_bytes / step.bound_bytes,
        partials=partials / step.bound_bytes,
        instructions=instructions,
        bytes=loaded + stored,
        limit=entry.instructions.get(step.step) if (dtype, arch) == ("bf16", "sm_90a") and _is_main(kernel) else None,
        known=entry.known.get((step.step, width, dtype), ""),
    )


def _short(kernel: KernelCounts) -> str:
    return kernel.name.replace("fm::", "")


def _bits(widths: dict[int, int]) -> str:
    return " ".join(f"{bits}x{count}" for bits, count in widths.items())


_COLUMNS = (
    "op",
    "step",
    "kernel",
    "width",
    "dtype",
    "registers",
    "spilled",
    "shared",
    "occupancy",
    "loads (bits x instructions)",
    "stores",
    "bytes / bound",
    "partials",
    "instructions",
    "issue slots",
)
_OF_ARCH = (5, 6, 7, 8, 9, 10, 13, 14)  # the columns with one figure per architecture


def cells(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the cells of a line: one kernel at one shape; `rows` has one row per architecture."""
    row = rows[0]

    def each(values: Sequence[str]) -> str:
        return values[0] if len(set(values)) == 1 else " / ".join(values)

    return (
        row.op,
        row.step,
        row.kernel,
        str(row.width),
        row.dtype,
        each([str(r.registers) for r in rows]),
        each([str(r.spilled_bytes) for r in rows]),
        each([str(r.shared_bytes) for r in rows]),
        each([f"{r.occupancy:.2f}" for r in rows]),
        each([r.load_bits for r in rows]),
        each([r.store_bits for r in rows]),
        f"{row.ratio:.3f}",
        f"{row.partials:.3f}",
        each([_figure(r.instructions, 1) for r in rows]),
        each([", ".join(f"{share:.2f}" for share in r.issue_slots) or "-" for r in rows]),
    )


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the cells of the table: figures that differ between architectures are in one cell, separated by " / "."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:  # a kernel that one direction launches twice gets one line
        groups.setdefault((row.op, row.step, row.kernel, str(row.width), row.dtype), {})[row.arch] = row
    return [cells(list(group.values())) for group in groups.values()]


def of_arch(line: tuple[str, ...], index: int) -> tuple[str, ...]:
    """Return the line with the figures of one architecture only, by its index in the table."""
    return tuple(c.split(" / ")[index] if i in _OF_ARCH and " / " in c else c for i, c in enumerate(line))


def table(rows: Sequence[Row]) -> str:
    """Return the Markdown table."""
    head = ["| " + " | ".join(_COLUMNS) + " |", "|" + " --- |" * len(_COLUMNS)]
    return "\n".join(head + ["| " + " | ".join(line) + " |" for line in lines(rows)]) + "\n"


def parsed(text: str) -> list[tuple[str, ...]]:
    """Parse the result of table() to the lines that lines() returns."""
    found = [tuple(cell.strip() for cell in line.strip("|\n").split(" | ")) for line in text.splitlines()]
    return [line for line in found if len(line) == len(_COLUMNS) and line[0] in OPS]


def known_faults(rows: Sequence[Row]) -> list[str]:
    """Return a line for each op, step, shape and dtype that exceeds a limit for a known reason."""
    known = {
        (r.op, r.step, r.width, r.dtype): f"{'; '.join(r.faults())}: {r.known}" for r in rows if r.faults() and r.known
    }
    return [f"{op} {step} {width} {dtype}: {text}" for (op, step, width, dtype), text in known.items()]


def exceeded_limits(rows: Sequence[Row]) -> list[str]:
    """Return a line for each exceeded limit without a known reason."""
    return [
        f"{row.op} {row.step} {row.kernel} width {row.width} {row.dtype} {row.arch}: {fault}"
        for row in rows
        for fault in row.faults()
        if not row.known
    ]
