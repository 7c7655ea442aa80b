"""The command `fused-megatron doctor`; it parses its own arguments, since tyro may not be installed."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fused_megatron.checks import InputError
from fused_megatron.doctor.diagnosis import VARIABLES, diagnose
from fused_megatron.doctor.facts import Facts, GpuTrials, TokenFile, Torch
from fused_megatron.doctor.installation import find_installation, find_library, find_torch
from fused_megatron.doctor.machine import Questions, find_machine, find_tools
from fused_megatron.doctor.network import Lookups, find_network
from fused_megatron.doctor.output_formats import as_json, show, verdict

USAGE = """usage: fused-megatron doctor [--json] [--data PREFIX ...] [--config CONFIG.toml]

Prints what is installed, which kernels are compiled for which device, which backends and links are seen, what is
missing and the command that mends it. It compares prepared token files with their checksums for some seconds, and
the datasets that --data names to their end. On a machine with GPUs it runs every op on one of them and compares the
results, lets two NCCL ranks add up, and says which backend attention gets: of the config's shape with --config.
Exit code 0: this machine can train; 1: something is broken."""


def run_doctor(arguments: Sequence[str]) -> int:
    """Gather facts, diagnose and print; return the exit code, which is 1 if something is broken.

    Raises:
        InputError: an argument is unknown.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE)
        return 0
    options = parse_options(arguments)
    facts = gather_facts(options.datasets, options.config)
    findings = diagnose(facts)
    if options.as_json:
        print(as_json(facts, findings))
    else:
        show(facts, findings)
    return verdict(findings)[0]


@dataclass
class DoctorOptions:
    """Parsed arguments: whether to print JSON, prefixes of datasets, and the config of --config."""

    as_json: bool = False
    datasets: list[str] = field(default_factory=list)
    config: str | None = None


def parse_options(arguments: Sequence[str]) -> DoctorOptions:
    """Parse the arguments of `fused-megatron doctor`; raise InputError if one is unknown."""
    options = DoctorOptions()
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--json":
            options.as_json = True
        elif argument == "--data" and rest:
            options.datasets.append(rest.pop(0))
        elif argument == "--config" and rest:
            options.config = rest.pop(0)
        else:
            missing = {"--data": "a prefix", "--config": "a .toml file"}
            problem = f"{argument} needs {missing[argument]}" if argument in missing else f"unknown option {argument}"
            raise InputError(f"fused-megatron doctor: {problem} (options: --json, --data PREFIX, --config CONFIG.toml)")
    return options


def gather_facts(datasets: Sequence[str] = (), config: str | None = None) -> Facts:
    """Gather all facts. Programs and look-ups that may hang start first, and run while torch is imported.

    Args:
        datasets: prefixes of token files to read.
        config: config whose attention is tried on a GPU; None: common shapes.

    Raises:
        InputError: a dataset or the config does not exist, or the config is wrong.

    Communication: two gloo ranks within this process; with two GPUs, two ranks of their own.
    """
    questions, lookups = Questions(), Lookups()
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    installation = find_installation()
    torch = find_torch()
    library = find_library(torch.error is None, environment.get("FUSED_MEGATRON_LIBRARY"))
    network = find_network(lookups, gloo=torch.backends.get("gloo", False))
    machine = find_machine(questions)
    return Facts(
        installation,
        torch,
        library,
        find_tools(questions),
        machine,
        network,
        environment,
        _tokens(datasets),
        _gpu_trials(torch, config),
    )


def _gpu_trials(torch: Torch, path: str | None) -> GpuTrials:
    """Try the GPUs that torch sees; empty without one, or without torch."""
    if path is None and not torch.sees_gpus:
        return GpuTrials()
    from fused_megatron.config.config_file import load_config  # noqa: PLC0415 - a package that it needs may be missing

    config = None if path is None else load_config(Path(path), [])
    if not torch.sees_gpus:
        return GpuTrials()
    from fused_megatron.doctor.gpu_trials import try_gpus  # noqa: PLC0415 - needs torch, which may be missing

    return try_gpus(torch.sees_gpus, config)


def _tokens(datasets: Sequence[str]) -> tuple[TokenFile, ...]:
    """Read token files; empty if a package for it is missing, which the installation facts report."""
    if any(importlib.util.find_spec(package) is None for package in ("torch", "numpy", "msgspec")):
        return ()
    from fused_megatron.doctor.tokens import find_tokens  # noqa: PLC0415

    return find_tokens(datasets)
