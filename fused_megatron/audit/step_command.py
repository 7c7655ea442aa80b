"""The command `fused-megatron audit --step CONFIG`: kernels, bytes, waits and collectives of a training step."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fused_megatron.checks import check
from fused_megatron.config import TrainConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.observe.kernel_counts import KINDS
from fused_megatron.planning.command_line import split_options
from fused_megatron.planning.step_budget import Budget, LayerBudget, StepBudget, layer_budget, step_budget
from fused_megatron.terminal_tables import print_report

USAGE = """usage: fused-megatron audit --step CONFIG.toml [--section.key value ...] [--write PAGE.md]

Runs a training step of the config's layout on the meta device with a fake group of all ranks, as if on GPUs, and counts
kernels, their bytes, collectives and the host's waits. It needs no GPU, memory, data or compiler.

options:
  --write PAGE.md   put the table between the marks of this config in a page (docs/gpu_step.md)

All keys of a config: fused-megatron train --help"""

TOTAL, HOST_SYNCS = "all kernels", "host waits"
_COLUMNS = ("layer, forward", "layer, backward", "ends", "update", "step")


def run_step_audit(words: Sequence[str]) -> int:
    """Print or write the table of a config and return the exit code.

    Raises:
        InputError: arguments or a config that do not fit; a page without the marks of the config.
    """
    if any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    path, config, page = parse_options(words)
    text = report(config)
    if page is None:
        print_report(text)
        return 0
    begin, end = marks(path.stem)
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    check(begin in old and end in old, f"{page} must have the lines {begin.strip()} and {end}")
    before, behind = old.partition(begin)[0], old.partition(end)[2]
    page.write_text(f"{before}{begin}{text}{end}{behind}", encoding="utf-8")
    print(f"{page}: {path.stem}")
    return 0


def parse_options(words: Sequence[str]) -> tuple[Path, TrainConfig, Path | None]:
    """Return the file of the config, the config, and the page that is written; None: the table is printed."""
    options, overrides = split_options(words, ("--step", "--write"), ())
    path = Path(options["--step"])
    return path, load_config(path, overrides), Path(options["--write"]) if "--write" in options else None


def marks(name: str) -> tuple[str, str]:
    """Return the lines around the table of a config in a page."""
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"


def report(config: TrainConfig) -> str:
    """Return the table of a config with a line about its layout."""
    layer, step = layer_budget(config), step_budget(config)
    parallel = config.parallel
    layout = f"tp={parallel.tensor_parallel_size} pp={parallel.pipeline_parallel_size}"
    layout += f" dp={parallel.data_parallel_size or 1}" + " with sequence parallelism" * parallel.sequence_parallel
    return (
        f"{layout}; {step.num_layers} layers on the first rank; a step of {step.num_microbatches} microbatches of "
        f"{config.training.microbatch_size} x {config.model.seq_len:,} tokens.\n\n{table(layer, step)}"
    )


def table(layer: LayerBudget, step: StepBudget) -> str:
    """Return the Markdown table: launches / MB by kind of kernel, then waits and collectives, by part of a step."""
    parts = [layer.forward, layer.backward, layer.ends, step.update, step.step]
    lines = [f"| | {' | '.join(_COLUMNS)} |", "|---|" + "---:|" * len(_COLUMNS)]
    for kind in [kind for kind in KINDS if any(part.launches.get(kind) for part in parts)]:
        lines.append(_line(kind, [_kernels(part, [kind]) for part in parts]))
    lines.append(_line(TOTAL, [_kernels(part, KINDS) for part in parts]))
    lines.append(_line(HOST_SYNCS, [str(part.host_syncs) for part in parts]))
    for kind in sorted({kind for part in parts for kind, calls in part.collectives.items() if calls}):
        lines.append(_line(kind, [f"{part.collectives.get(kind, 0):,}" for part in parts]))
    return "\n".join(lines) + "\n"


def parsed(text: str) -> dict[str, dict[str, int]]:
    """Parse the result of table(): launches, waits or calls by row and column, and MB by the row "<kind>, MB"."""
    found: dict[str, dict[str, int]] = {}
    for line in text.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if len(cells) == len(_COLUMNS) and name and cells[0][:1].isdigit():
            numbers, megabytes = ([_whole(cell.partition(" / ")[of]) for cell in cells] for of in (0, 2))
            found[name] = dict(zip(_COLUMNS, numbers, strict=True))
            if any(megabytes):
                found[f"{name}, MB"] = dict(zip(_COLUMNS, megabytes, strict=True))
    return found


def _whole(text: str) -> int:
    return int(text.replace(",", "") or 0)


def _kernels(part: Budget, kinds: Iterable[str]) -> str:
    launches, moved = (_sum(counts, kinds) for counts in (part.launches, part.moved))
    return f"{launches:,} / {moved / 1e6:,.0f}" if launches else "0"


def _sum(counts: Mapping[str, int], kinds: Iterable[str]) -> int:
    return sum(counts.get(kind, 0) for kind in kinds)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"
