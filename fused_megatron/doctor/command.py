"""The command `fused-megatron doctor`; it parses its own arguments, since tyro may not be installed."""

import importlib.util
import os
from collections.abc import Sequence

from fused_megatron.checks import InputError
from fused_megatron.doctor.diagnosis import VARIABLES, diagnose
from fused_megatron.doctor.facts import Facts, TokenFile
from fused_megatron.doctor.installation import find_installation, find_library, find_torch
from fused_megatron.doctor.machine import Questions, find_machine, find_tools
from fused_megatron.doctor.network import Lookups, find_network
from fused_megatron.doctor.output_formats import as_json, show, verdict

USAGE = """usage: fused-megatron doctor [--json] [--data PREFIX ...]

Prints what is installed, which kernels are compiled for which device, which backends and links are seen, what is
missing and the command that mends it. It compares prepared token files with their checksums for some seconds, and
the datasets that --data names to their end. Exit code 0: this machine can train; 1: something is broken."""


def run_doctor(arguments: Sequence[str]) -> int:
    """Gather facts, diagnose and print; return the exit code, which is 1 if something is broken.

    Raises:
        InputError: an argument is unknown.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE)
        return 0
    wants_json, datasets = _parse(arguments)
    facts = gather_facts(datasets)
    findings = diagnose(facts)
    if wants_json:
        print(as_json(facts, findings))
    else:
        show(facts, findings)
    return verdict(findings)[0]


def _parse(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Return whether to print JSON, and the datasets to read."""
    wants_json = False
    datasets = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--json":
            wants_json = True
        elif argument == "--data" and rest:
            datasets.append(rest.pop(0))
        else:
            problem = "--data needs a prefix" if argument == "--data" else f"unknown option {argument}"
            raise InputError(f"fused-megatron doctor: {problem} (options: --json, --data PREFIX)")
    return wants_json, datasets


def gather_facts(datasets: Sequence[str] = ()) -> Facts:
    """Gather all facts. Programs and look-ups that may hang start first, and run while torch is imported.

    Args:
        datasets: prefixes of token files to read.

    Raises:
        InputError: a dataset does not exist.

    Communication: two gloo ranks within this process.
    """
    questions, lookups = Questions(), Lookups()
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    installation = find_installation()
    torch = find_torch()
    library = find_library(torch.error is None, environment.get("FUSED_MEGATRON_LIBRARY"))
    network = find_network(lookups, gloo=torch.backends.get("gloo", False))
    machine = find_machine(questions)
    tokens = _tokens(datasets)
    return Facts(installation, torch, library, find_tools(questions), machine, network, environment, tokens)


def _tokens(datasets: Sequence[str]) -> tuple[TokenFile, ...]:
    """Read token files; empty if a package for it is missing, which the installation facts report."""
    if any(importlib.util.find_spec(package) is None for package in ("torch", "numpy", "msgspec")):
        return ()
    from fused_megatron.doctor.tokens import find_tokens  # noqa: PLC0415

    return find_tokens(datasets)
