"""Output of facts and findings: tables on a terminal, aligned lines in a pipe or file, JSON for programs."""

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from fused_megatron.doctor.device_code import runs_on
from fused_megatron.doctor.facts import Facts
from fused_megatron.doctor.finding import BROKEN, NOTE, SLOW, Finding
from fused_megatron.doctor.gpu_diagnosis import has_expandable_segments

Section = tuple[str, list[tuple[str, str]]]

_COLORS = {BROKEN: "bold red", SLOW: "yellow", NOTE: "cyan"}
_LINKS = "NVLink", "PCIe"


def verdict(findings: Sequence[Finding]) -> tuple[int, str]:
    """Return (exit code, conclusion); the exit code is 0 if this machine can train."""
    num_broken, num_slow = (sum(finding.level == level for finding in findings) for level in (BROKEN, SLOW))
    if num_broken:
        return 1, f"{num_broken} broken: training would fail here, or not be what was installed."
    return 0, f"This machine can train{f'; {num_slow} of the findings make it slower' if num_slow else ''}."


def as_json(facts: Facts, findings: Sequence[Finding]) -> str:
    """Return facts and findings as one JSON object."""
    code, _ = verdict(findings)
    found = {"can_train": code == 0, "findings": list(map(dataclasses.asdict, findings))}
    return json.dumps({**found, **dataclasses.asdict(facts)}, indent=2)


def sections(facts: Facts) -> list[Section]:
    """Return the facts as titled sections of (name, value) rows."""
    return [
        ("Installed", _installed(facts)),
        ("Kernels", _kernels(facts)),
        ("Machine", _machine(facts)),
        ("GPU trials", _gpu_trials(facts)),
        ("Ranks", _ranks(facts)),
        *([("Tokens", _tokens(facts))] if facts.tokens else []),
    ]


def _installed(facts: Facts) -> list[tuple[str, str]]:
    installation, tools = facts.installation, facts.tools
    where = f" (checkout {installation.checkout})" if installation.checkout else ""
    rows = [("fused-megatron", f"{installation.version or 'unknown version'}{where}")]
    rows.append(("Python", f"{installation.python}, {installation.platform}"))
    for package in installation.packages:
        text = package.installed or "-"
        if package.name == "torch" and facts.torch.build:
            text += f", {facts.torch.build} build"
        if not package.fits:
            text += f"  ({package.requirement} is needed)" if package.extra is None else ""
        rows.append((package.name, text + (f"  (optional: {package.extra})" if package.extra else "")))
    rows.append(("C++20 compiler", tools.cxx or "-"))
    rows.append(("nvcc", f"{tools.nvcc_release}, {tools.nvcc}" if tools.nvcc_release else "-"))
    return rows


def _kernels(facts: Facts) -> list[tuple[str, str]]:
    library = facts.library
    state = "loaded" if library.loads else f"not loaded: {library.reason}" if library.reason else "not tried"
    rows = [("library", f"{library.path}, {state}")]
    rows.append(("GPU code in it", ", ".join(library.device_code) or "none"))
    for gpu in sorted({(gpu.name, gpu.capability) for gpu in facts.machine.gpus}):
        rows.append(
            (gpu[0], f"compute capability {gpu[1]}: runs {runs_on(library.device_code, gpu[1]) or 'none of it'}")
        )
    lines: dict[str, list[str]] = {}
    for op in library.ops:
        gpu_code = {"CUDA": "compiled CUDA", "Triton": "Triton, compiled at the first call"}.get(op.gpu, op.gpu)
        cpu_code = {"kernel": "compiled"}.get(op.cpu, op.cpu)
        lines.setdefault(f"CPU: {cpu_code};  GPU: {gpu_code}", []).append(op.op)
    rows += [(op, kinds) for kinds, ops in lines.items() for op in ops]
    rows += [(f"attention, {each.inputs}", f"{each.kernel}: {each.reason}") for each in library.attention]
    return rows


def _machine(facts: Facts) -> list[tuple[str, str]]:
    machine = facts.machine
    rows = [("processor", f"{machine.cpu or 'unknown'}: {', '.join(machine.vector_units) or 'no wide vectors known'}")]
    threads = facts.environment.get("OMP_NUM_THREADS", "not set")
    used = f", {facts.torch.threads} threads an op" if facts.torch.threads else ""
    rows.append(("cores", f"{machine.usable_cores:g} of {machine.cores} usable{used} (OMP_NUM_THREADS {threads})"))
    rows.append(("memory", f"{machine.memory_gb:.1f} GB, {machine.available_gb:.1f} GB free"))
    if not machine.gpus:
        rows.append(
            ("GPU", "none seen" if not facts.torch.sees_gpus else f"{facts.torch.sees_gpus}, seen only by torch")
        )
    for index, gpu in enumerate(machine.gpus):
        rows.append((f"GPU {index}", f"{gpu.name}, {gpu.memory_gb:.0f} GB, driver {machine.driver}"))
    if machine.links:
        kinds = [
            f"{count} pair(s) over {_LINKS[not kind.startswith('NV')]} ({kind})"
            for kind, count in machine.links.items()
        ]
        rows.append(("GPU links", ", ".join(kinds)))
    return rows


def _gpu_trials(facts: Facts) -> list[tuple[str, str]]:
    trials, machine, buses = facts.gpu_trials, facts.machine, facts.machine.buses
    toolkit = facts.library.toolkit
    library = f"the library needs CUDA {toolkit.partition('.')[0]}" if toolkit else "the library has no GPU code"
    rows = {
        "ops": "",
        "attention": "",
        "cuDNN": trials.cudnn or "none",
        "two NCCL ranks": "one GPU only",
        "symmetric memory": "one GPU only",
        "driver": f"{machine.driver or 'unknown'}, CUDA {machine.driver_cuda or 'unknown'}; {library}",
        "memory nodes": ", ".join(f"{address} at {_node(node)}" for address, node in buses.gpu_nodes.items())
        or "unknown",
        "expandable_segments": "on" if has_expandable_segments(facts) else "off",
    }
    right = [trial for trial in trials.ops if trial.problem is None]
    rows["ops"] = f"{len(right)} of {len(trials.ops)} as in float64 on the CPU, forward and backward"
    if trials.two_ranks is not None:
        speed = trials.two_ranks.gb_per_s
        rows["two NCCL ranks"] = "failed" if speed is None else f"added up 64 MiB at {speed:.0f} GB/s"
        rows["symmetric memory"] = "mapped" if trials.two_ranks.maps_memory else "not mapped"
    if not facts.torch.sees_gpus:
        rows = dict.fromkeys(rows, "no GPU")
    found = [(name, value) for name, value in rows.items() if name != "attention" or not facts.torch.sees_gpus]
    found += [(f"attention, {each.inputs}", f"{each.kernel}: {each.reason}") for each in trials.attention]
    peers = "" if buses.peer_memory else "; nvidia_peermem is not loaded"
    return [*found, ("InfiniBand", f"{', '.join(buses.infiniband)}{peers}" if buses.infiniband else "no card")]


def _node(node: int) -> str:
    return "an unknown node" if node < 0 else f"node {node}"


def _ranks(facts: Facts) -> list[tuple[str, str]]:
    network, torch = facts.network, facts.torch
    rows = [("backends", ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in torch.backends.items()) or "-")]
    addresses = (f"{name} {address or 'no address'}" for name, address in network.interfaces.items())
    rows.append(("interfaces", ", ".join(addresses) or "-"))
    host = ", ".join(network.host_addresses) or "no address"
    rows.append(("host name", f"{network.hostname}: {host}, {_lookup(network.host_lookup_s)}"))
    rows.append(("127.0.0.1", f"its name: {_lookup(network.localhost_lookup_s)}"))
    if network.loopback_ms is not None:
        rows.append(("two gloo ranks", f"started and added up in {network.loopback_ms:.0f} ms"))
    return rows


def _tokens(facts: Facts) -> list[tuple[str, str]]:
    rows = []
    for file in facts.tokens:
        state = "as its checksums say" if file.is_read else "as its checksums say, as far as it was read"
        if file.problem is not None:
            state = "damaged"
        elif not file.has_digest:
            state = "no checksums"
        rows.append((f"{file.num_bytes / 1e6:,.1f} MB", f"{file.prefix}.bin: {state}"))
    return rows


def _lookup(seconds: float | None) -> str:
    return "no answer while the doctor waited" if seconds is None else f"{1e3 * seconds:.0f} ms"


def show(facts: Facts, findings: Sequence[Finding]) -> None:
    """Print facts and findings: tables on a terminal, lines elsewhere."""
    try:
        console = importlib.import_module("rich.console").Console(highlight=False)
    except ImportError:
        console = None  # rich may be missing
    if console is None or not console.is_terminal:
        print("\n".join(plain(facts, findings)))
        return
    _show_tables(console, facts, findings)


def plain(facts: Facts, findings: Sequence[Finding]) -> Iterable[str]:
    """Yield the lines of facts, findings and conclusion."""
    for title, rows in sections(facts):
        yield title
        width = max(len(name) for name, _ in rows)
        yield from (f"  {name.ljust(width)}  {value}" for name, value in rows)
        yield ""
    yield "Findings"
    for finding in findings or [Finding(NOTE, "none")]:
        yield f"  {finding.level}: {finding.text}"
        if finding.command:
            yield f"      {finding.command}"
    yield ""
    yield verdict(findings)[1]


def _show_tables(console: Any, facts: Facts, findings: Sequence[Finding]) -> None:
    table_of = importlib.import_module("rich.table").Table
    escape = importlib.import_module("rich.markup").escape
    for title, rows in sections(facts):
        table = table_of(title=title, title_justify="left", title_style="bold", show_header=False, min_width=60)
        table.add_column(no_wrap=True, style="dim")
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(escape(name), escape(value))
        console.print(table)
    for finding in findings:
        color = _COLORS[finding.level]
        console.print(f"[{color}]{finding.level}[/]  {escape(finding.text)}")
        if finding.command:
            # On one line in any terminal, so that it can be copied.
            console.print(f"    {finding.command}", markup=False, style="green", soft_wrap=True)
    code, line = verdict(findings)
    console.print(f"[bold {'red' if code else 'green'}]{escape(line)}[/]")
    sys.stdout.flush()
