"""Results file of a benchmark run. It is written after every case, so that an interrupted run loses nothing.

    {"format": "fused-megatron results", "version": 1, "complete": true, "theme": "ops", "hardware": "..", "date": "..",
     "settings": {"torch": "2.13.0", ..}, "comparisons": [..]}

A file of pytest-benchmark (--benchmark-json, --benchmark-autosave) that our benchmarks wrote can be read, too.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from fused_megatron.benchmarking.side_by_side import Comparison, Text
from fused_megatron.checks import InputError
from fused_megatron.untrusted_files import MOST_JSON_BYTES, convert, parse_json, read_bounded

FORMAT, VERSION = "fused-megatron results", 1
_MOST_CASES = 10_000
_MOST_FLOPS = 10**30


class _Benchmark(msgspec.Struct):
    group: str | None
    extra_info: dict[str, Any]


class _PytestBenchmarks(msgspec.Struct):
    """Fields that are read from a file of pytest-benchmark."""

    machine_info: dict[str, Any]
    benchmarks: Annotated[list[_Benchmark], msgspec.Meta(max_length=_MOST_CASES)]
    datetime: str = ""


@dataclass
class Results:
    """Results of a benchmark run.

    Attributes:
        theme: subject of the benchmark: "ops", "layers", "end_to_end", "node", "pipeline".
        hardware: name of the machine's processor or GPUs.
        date: first day of the run, "2026-11-22".
        settings: versions, threads and other settings that affect the figures.
        ceilings: speed limits of the machine, measured in the same run: "copy_gb_per_s", "gemm_gflop_per_s float32".
        comparisons: measurements of each case.
        complete: False if the run was interrupted, or is not finished.
    """

    theme: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,39}\Z")]
    """Part of file names."""
    hardware: Text
    date: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")]
    settings: dict[Text, Text] = field(default_factory=dict)
    ceilings: dict[Text, Annotated[float, msgspec.Meta(ge=1e-6, le=1e15)]] = field(default_factory=dict)
    comparisons: Annotated[list[Comparison], msgspec.Meta(max_length=_MOST_CASES)] = field(default_factory=list)
    complete: bool = False

    @property
    def file_name(self) -> str:
        """<theme>_<hardware>_<yyyymm>.json"""
        hardware = re.sub(r"[^a-z0-9]+", "-", self.hardware.lower()).strip("-")
        return f"{self.theme}_{hardware}_{self.date.replace('-', '')[:6]}.json"


def write_results(results: Results, path: Path) -> None:
    """Replace the file by these results; a reader sees the old file or the new one.

    Raises:
        OSError: the file cannot be written; the old one is unchanged.
    """
    whole = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(results)}
    whole["comparisons"] = [_record(comparison) for comparison in results.comparisons]
    path.parent.mkdir(parents=True, exist_ok=True)
    replacement = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        replacement.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        replacement.replace(path)
    finally:
        replacement.unlink(missing_ok=True)  # left by a full disk or Ctrl-C


def read_results(path: Path) -> Results:
    """Read the results in a file.

    Raises:
        InputError: the file is missing, is not JSON, holds no results, or results of another version.
    """
    try:
        content = read_bounded(path, MOST_JSON_BYTES)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror} (make bench writes results to benchmarks/results)") from None
    try:
        whole = parse_json(content, object)
    except InputError as error:
        raise InputError(f"{path} is {error}") from None
    if not isinstance(whole, dict):
        raise InputError(f"{path} holds no results: its JSON is no object")
    try:
        if whole.get("format") == FORMAT:
            return _from_ours(whole, path)
        if isinstance(whole.get("benchmarks"), list):
            return _from_pytest_benchmark(whole, path)
    except _DamagedError as error:
        raise InputError(f"{path} is damaged: {error} (copy it again, or measure again: make bench)") from None
    raise InputError(f"{path} holds no results of make bench (format={whole.get('format')!r:.40})")


class _DamagedError(ValueError):
    """Fields of a file are wrong."""


def _from_ours(whole: dict[str, Any], path: Path) -> Results:
    version = whole.get("version")
    if version != VERSION:
        raise InputError(
            f"{path} has version={version!r:.20} of the results' format; this release reads {VERSION} (measure again: "
            "make bench, or read it with the release that wrote it)"
        )
    return _checked({f.name: whole[f.name] for f in dataclasses.fields(Results) if f.name in whole})


def _from_pytest_benchmark(whole: dict[str, Any], path: Path) -> Results:
    try:
        file = convert(whole, _PytestBenchmarks)
    except InputError as error:
        raise _DamagedError(str(error)) from None
    comparisons = []
    for benchmark in file.benchmarks:
        info = benchmark.extra_info
        if "seconds" not in info:  # a call overhead, which has its own table at the end of the run
            continue
        op, _, dtype = (benchmark.group or "").rpartition(" ")
        comparisons.append({**info, "op": op, "dtype": dtype, "bars": {}})
    if not comparisons:
        raise InputError(f"{path} holds no comparisons: pytest-benchmark wrote it for other benchmarks than ours")
    cpu = file.machine_info.get("cpu")
    hardware = cpu.get("brand_raw") if isinstance(cpu, dict) else None
    return _checked(
        {
            "theme": "ops",
            "hardware": str(hardware or file.machine_info.get("machine", "?")),
            "date": file.datetime[:10],
            "settings": {"python": str(file.machine_info.get("python_version", "?"))},
            "comparisons": comparisons,
            "complete": True,
        }
    )


def _checked(whole: dict[str, Any]) -> Results:
    """Build Results from these fields; raise _DamagedError if a type or bound of the dataclasses does not hold."""
    try:
        results = convert(whole, Results)
    except InputError as error:
        raise _DamagedError(str(error)) from None
    missing = {"settings", "comparisons", "complete"} - whole.keys()
    if missing or not all("seconds" in record for record in whole["comparisons"]):
        raise _DamagedError(f"{min(missing, default='seconds')} must be there")
    for comparison in results.comparisons:
        if max(comparison.model_flops or 0, comparison.hardware_flops or 0) > _MOST_FLOPS:
            raise _DamagedError(f"FLOPs must be {_MOST_FLOPS:.0e} at most")
        for name, seconds in comparison.forward_seconds.items():
            if comparison.seconds.get(name) and len(seconds) not in (0, len(comparison.seconds[name])):
                raise _DamagedError(f"forward_seconds of {name!r} must be as many as its seconds")
    return results


def _record(comparison: Comparison) -> dict[str, Any]:
    return {f.name: _plain(getattr(comparison, f.name)) for f in dataclasses.fields(comparison)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, Mapping) else value
