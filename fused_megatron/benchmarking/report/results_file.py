"""Results of a benchmark run as a file: written after every case, so that an interrupted run loses nothing.

    {"format": "fused-megatron results", "version": 1, "complete": true, "theme": "ops", "hardware": "..", "date": "..",
     "settings": {"torch": "2.13.0", ..}, "comparisons": [..]}

A file of pytest-benchmark (--benchmark-json, --benchmark-autosave) that our benchmarks left is read too.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fused_megatron.benchmarking.side_by_side import Bars, Comparison
from fused_megatron.checks import InputError
from fused_megatron.observe.traffic import Traffic

FORMAT, VERSION = "fused-megatron results", 1


@dataclass
class Results:
    """A run.

    Attributes:
        theme: what was measured: "ops", "layers", "end_to_end", "node", "pipeline".
        hardware: on what, as people call it.
        date: when it began, "2026-11-22".
        settings: versions, threads and whatever else the figures hang on.
        ceilings: what this machine can do at most, measured in the same run: "copy_gb_per_s",
            "gemm_gflop_per_s float32".
        comparisons: a case each.
        complete: False where the run was interrupted, or goes on.
    """

    theme: str
    hardware: str
    date: str
    settings: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    complete: bool = False

    @property
    def file_name(self) -> str:
        """<theme>_<hardware>_<yyyymm>.json"""
        hardware = re.sub(r"[^a-z0-9]+", "-", self.hardware.lower()).strip("-")
        return f"{self.theme}_{hardware}_{self.date.replace('-', '')[:6]}.json"


def write_results(results: Results, path: Path) -> None:
    """Replace the file by these results; a reader sees the old one or the new one.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    whole = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(results)}
    whole["comparisons"] = [_record(comparison) for comparison in results.comparisons]
    path.parent.mkdir(parents=True, exist_ok=True)
    replacement = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        replacement.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        replacement.replace(path)
    finally:
        replacement.unlink(missing_ok=True)  # of a disk that is full, and after Ctrl-C


def read_results(path: Path) -> Results:
    """The results in a file.

    Raises:
        InputError: no such file, no JSON, no results, results of another version.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror} (make bench writes results to benchmarks/results)") from None
    except ValueError as error:
        raise InputError(f"{path} is no JSON, or cut off ({error})") from None
    if not isinstance(whole, dict):
        raise InputError(f"{path} holds no results: its JSON is no object")
    try:
        if whole.get("format") == FORMAT:
            return _from_ours(whole, path)
        if isinstance(whole.get("benchmarks"), list):
            return _from_pytest_benchmark(whole, path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged: {type(error).__name__} {error}") from None
    raise InputError(f"{path} holds no results of make bench (format={whole.get('format')!r})")


def _from_ours(whole: dict[str, Any], path: Path) -> Results:
    version = whole.get("version")
    if version != VERSION:
        raise InputError(
            f"{path} has version={version} of the results' format; this release reads {VERSION} (measure again: make "
            "bench, or read it with the release that wrote it)"
        )
    names = [f.name for f in dataclasses.fields(Results) if f.name not in ("comparisons", "ceilings")]
    comparisons = [_comparison(record) for record in whole["comparisons"]]
    ceilings = whole.get("ceilings", {})  # files of the first release have none
    return Results(**{name: whole[name] for name in names}, ceilings=ceilings, comparisons=comparisons)


def _from_pytest_benchmark(whole: dict[str, Any], path: Path) -> Results:
    machine = whole["machine_info"]
    comparisons = []
    for benchmark in whole["benchmarks"]:
        info = benchmark["extra_info"]
        if "seconds" not in info:  # the cost of a call has its own table at the end of the run
            continue
        op, _, dtype = benchmark["group"].rpartition(" ")
        comparisons.append(_comparison({**info, "op": op, "dtype": dtype, "bars": {}}))
    if not comparisons:
        raise InputError(f"{path} holds no comparisons: pytest-benchmark wrote it for other benchmarks than ours")
    settings = {"python": str(machine.get("python_version", "?"))}
    hardware = str((machine.get("cpu") or {}).get("brand_raw") or machine.get("machine", "?"))
    return Results("ops", hardware, str(whole["datetime"])[:10], settings, comparisons=comparisons, complete=True)


def _record(comparison: Comparison) -> dict[str, Any]:
    return {f.name: _plain(getattr(comparison, f.name)) for f in dataclasses.fields(comparison)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def _comparison(record: Mapping[str, Any]) -> Comparison:
    known = {f.name for f in dataclasses.fields(Comparison)}
    values = {name: value for name, value in record.items() if name in known}
    values["bars"] = Bars(**values["bars"])
    values["traffic"] = {name: Traffic(**traffic) for name, traffic in values.get("traffic", {}).items()}
    if not all(isinstance(s, float) and s > 0 for seconds in values["seconds"].values() for s in seconds):
        raise ValueError("seconds must be numbers above 0")
    return Comparison(**values)
