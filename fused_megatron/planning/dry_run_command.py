"""The command `fused-megatron dry-run`: memory, computation and transfers of ranks in a step, as tables or JSON."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_megatron.checks import check, check_one_of
from fused_megatron.config import TrainConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.planning.command_line import (
    on_ranks,
    split_options,
    text_table,
    vocabulary_note,
    whole_number,
    with_vocabulary,
)
from fused_megatron.planning.dry_run import DryRun, RankReport
from fused_megatron.planning.step_profile import ACTIVATIONS, KINDS

USAGE = """usage: fused-megatron dry-run CONFIG.toml [--section.key value ...] [options]

Runs a training step of the config's layout on fake tensors, with a fake group of all ranks: no GPU, memory or data.

options:
  --ranks N       number of ranks; the data-parallel size follows (default: the config's, or 1)
  --rank R        only this rank, with its activations by layer (default: one rank of each place of the pipeline)
  --device TYPE   of the fake tensors, cpu or cuda; cuda needs a GPU, but none of its memory. It decides training.dtype
                  and bucket_mb where the config leaves them to the device (default: fake tensors of the CPU, with the
                  dtype and buckets of a GPU)
  --routes R      routes of tokens to experts: balanced, or worst (every token to the experts of the rank)
  --json          print JSON

All keys of a config: fused-megatron train --help"""

_UNKNOWN = (
    "Not in it: what an allocator wastes in fragments, the CUDA context, NCCL's buffers, and what a kernel takes and "
    "gives back inside."
)


@dataclass(frozen=True)
class DryRunOptions:
    """Parsed arguments of the command.

    Attributes:
        config: the config of the run.
        rank: the only rank to report; None: the first rank of each pipeline rank.
        device: device of the fake tensors.
        as_json: print JSON instead of tables.
        routes: as DryRun.
        note: what was chosen where the config leaves it open; empty: nothing.
    """

    config: TrainConfig
    rank: int | None
    device: str
    as_json: bool
    routes: str = "balanced"
    note: str = ""


def run_dry_run(words: Sequence[str]) -> int:
    """Print the report and return the exit code.

    Raises:
        InputError: arguments, a config or a layout that do not fit.
    """
    if any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    options = parse_options(words)
    begin = time.perf_counter()
    run = DryRun(options.config, options.device, options.routes)
    wanted = run.pipeline_ranks() if options.rank is None else [options.rank]
    reports = [run.rank(rank) for rank in wanted]
    seconds = time.perf_counter() - begin
    if options.as_json:
        print(json.dumps({**_summary(run, reports), "ranks": [_as_json(report) for report in reports]}, indent=2))
    else:
        print(describe(run, reports, by_layer=options.rank is not None))
        print(f"\nChosen: {options.note}" if options.note else "", end="\n" if options.note else "")
        print(f"\n{_UNKNOWN}\n{len(reports)} ranks in {seconds:.1f} s")
    return 0


def parse_options(words: Sequence[str]) -> DryRunOptions:
    """Parse the arguments of `fused-megatron dry-run`.

    Raises:
        InputError: no config, an option without its value, numbers that do not fit.
    """
    check(
        len(words) > 0 and not words[0].startswith("-"),
        "dry-run needs a config file first (a starting point: examples/gpt_tiny.toml)",
    )
    found, overrides = split_options(words[1:], ("--ranks", "--rank", "--device", "--routes"), ("--json",))
    given = load_config(Path(words[0]), overrides)
    config = with_vocabulary(given)
    if "--ranks" in found:
        config = on_ranks(config, whole_number("--ranks", found["--ranks"]))
    device = found.get("--device", "cpu")
    check_one_of("device", device, ("cpu", "cuda"))
    config = config.for_device(found.get("--device", "cuda"))
    rank = whole_number("--rank", found["--rank"]) if "--rank" in found else None
    return DryRunOptions(
        config, rank, device, "--json" in found, found.get("--routes", "balanced"), vocabulary_note(given)
    )


def describe(run: DryRun, reports: Sequence[RankReport], by_layer: bool = False) -> str:
    """Return the reports as tables."""
    config, parallel = run.config, run.config.parallel
    plan = f" {run.plan.name}" if parallel.pipeline_parallel_size > 1 else ""
    whole = _summary(run, reports)
    said = f" with {whole['parameters']:,} parameters" if "parameters" in whole else ""
    lines = [
        f"{config.model.family.upper()}{said} in {config.training.weight_dtype} on {run.world_size:,} ranks "
        f"(tp={parallel.tensor_parallel_size} pp={parallel.pipeline_parallel_size}{plan} "
        f"dp={parallel.data_parallel_size}{parallel.expert_text}{parallel.sequence_text}); "
        f"a step of {run.num_microbatches:,} microbatches of {config.training.microbatch_size} x "
        f"{config.model.seq_len:,} tokens",
    ]
    if config.model.num_experts is not None:
        lines.append(f"{run.routes.capitalize()} routes to experts")
    if "flops" in whole:
        lines.append(f"All ranks: {whole['flops'] / 1e15:,.1f} PFLOP a step")
    lines += ["", "Memory in GB of 10^9 bytes: behind a step, and when most is held, by kind", *_memory(reports)]
    lines += ["", "A step of a rank", *_work(reports)]
    for report in reports if by_layer else ():
        lines += ["", f"Activations of rank {report.rank} at its peak, GB by layer", *_layers(report)]
    return "\n".join(lines)


def _summary(run: DryRun, reports: Sequence[RankReport]) -> dict[str, Any]:
    """Return facts of the whole run; with parameters and flops if there is a report for each pipeline rank."""
    found: dict[str, Any] = {
        "world_size": run.world_size,
        "num_microbatches": run.num_microbatches,
        "device": run.device.type,
        "routes": run.routes,
    }
    if [report.rank for report in reports] == run.pipeline_ranks():
        found["parameters"] = sum(report.full_parameters for report in reports)
        # All ranks with the same pipeline rank compute the same number.
        found["flops"] = sum(report.flops for report in reports) * (run.world_size // len(reports))
    return found


def _memory(reports: Sequence[RankReport]) -> list[str]:
    kinds = [kind for kind in KINDS if any(report.by_kind().get(kind) for report in reports)]
    rows = [["rank", "pp", "blocks", "parameters", "behind", "peak", "at action", *kinds]]
    for report in reports:
        by_kind = report.by_kind()
        rows.append(
            [
                str(report.rank),
                str(report.pp_rank),
                "+".join(str(span.stop - span.start) for span in report.spans.values()),
                f"{report.num_parameters:,}",
                _gb(report.held_bytes),
                _gb(report.peak_bytes),
                at_text(report),
                *(_gb(by_kind.get(kind, 0)) for kind in kinds),
            ]
        )
    return text_table(rows)


def at_text(report: RankReport) -> str:
    """Return the moment of the peak: position (from 0) and name of the action."""
    return "none (update)" if report.at is None else f"{report.at[0]}: {report.at[1]}"


def _work(reports: Sequence[RankReport]) -> list[str]:
    """Return a table of computation and transfers; ranks that do the same share a row."""
    by_work: dict[str, list[RankReport]] = {}
    for report in reports:
        by_work.setdefault(repr((report.flops, report.host_syncs, sorted(report.transfers.items()))), []).append(report)
    rows = [["pp", "TFLOP", "host syncs", "transfers", "axis", "calls", "GB"]]
    for same in by_work.values():
        first = same[0]
        head = [_ranges([report.pp_rank for report in same]), f"{first.flops / 1e12:,.1f}", str(first.host_syncs)]
        for (kind, axis), (calls, num_bytes) in sorted(first.transfers.items(), key=lambda item: (item[0][1], item[0])):
            rows.append([*head, kind, axis, f"{calls:,}", _gb(num_bytes)])
            head = ["", "", ""]
        if not first.transfers:
            rows.append([*head, "none", "", "", ""])
    return text_table(rows)


def _layers(report: RankReport) -> list[str]:
    layers = {memory.layer: n for memory, n in report.peak.items() if memory.kind == ACTIVATIONS}
    rows = [[layer, _gb(num_bytes)] for layer, num_bytes in sorted(layers.items(), key=lambda item: _order(item[0]))]
    return text_table([["layer", "GB"], *rows])


def _order(layer: str) -> tuple[int, str]:
    name, _, number = layer.partition(".")
    return (int(number), name) if number.isdigit() else (-1, name)


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as ranges: [0, 3, 4, 5] is "0, 3-5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.3f}"


def _as_json(report: RankReport) -> dict[str, Any]:
    return {
        "rank": report.rank,
        "pp_rank": report.pp_rank,
        "groups": {axis: list(ranks) for axis, ranks in report.groups.items()},
        "stages": {
            str(index): {
                "blocks": [span.start, span.stop],
                "kept_bytes": sum(report.kept[index].values()),
                "tensor_parallel_bytes": dict(report.sent[index]),
                "context_parallel_bytes": dict(report.sent_to_context[index]),
                "expert_parallel_bytes": dict(report.sent_to_experts[index]),
            }
            for index, span in report.spans.items()
        },
        "num_parameters": report.num_parameters,
        "assembled_bytes": report.assembled_bytes,
        "held_bytes": report.held_bytes,
        "peak_bytes": report.peak_bytes,
        "peak_action": None if report.at is None else {"position": report.at[0], "action": str(report.at[1])},
        "peak_by_kind": {kind: report.by_kind().get(kind, 0) for kind in KINDS},
        "activations_by_layer": {m.layer: n for m, n in report.peak.items() if m.kind == ACTIVATIONS},
        "flops": report.flops,
        "host_syncs": report.host_syncs,
        "transfers": [
            {"kind": kind, "axis": axis, "calls": calls, "bytes": num_bytes}
            for (kind, axis), (calls, num_bytes) in sorted(report.transfers.items())
        ],
    }
