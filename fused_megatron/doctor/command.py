"""`fused-megatron doctor`. Its words are parsed by hand: what parses the other commands' may be missing."""

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

What is installed, which kernels are compiled for which device, which backends and links are seen, what is missing and
the command that mends it. Token files that were prepared are compared with their checksums, and so are the datasets
that --data names, to their end. Exit code 0: this machine can train; 1: something is broken."""


def run_doctor(words: Sequence[str]) -> int:
    """Look, judge and print; 1 when something is broken.

    Raises:
        InputError: an unknown word.
    """
    if any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    as_document, datasets = _parse(words)
    facts = gather_facts(datasets)
    findings = diagnose(facts)
    if as_document:
        print(as_json(facts, findings))
    else:
        show(facts, findings)
    return verdict(findings)[0]


def _parse(words: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether to print JSON, and the datasets to read."""
    as_document, datasets = False, []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--json":
            as_document = True
        elif word == "--data" and rest:
            datasets.append(rest.pop(0))
        else:
            wanted = "--data needs a prefix" if word == "--data" else f"unknown option {word}"
            raise InputError(f"fused-megatron doctor: {wanted} (options: --json, --data PREFIX)")
    return as_document, datasets


def gather_facts(datasets: Sequence[str] = ()) -> Facts:
    """Everything that the doctor looks at; what can hang is asked first and runs beside torch's import.

    Args:
        datasets: prefixes of token files to be read.

    Raises:
        InputError: there is no such dataset.

    Communication: two gloo ranks within this process.
    """
    questions, lookups = Questions(), Lookups()
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    installation = find_installation()
    torch = find_torch()
    library = find_library(torch.error is None, environment.get("FUSED_MEGATRON_LIBRARY"))
    network = find_network(lookups, gloo=torch.backends.get("gloo", False))
    machine, tokens = find_machine(questions), _tokens(datasets)
    return Facts(installation, torch, library, find_tools(questions), machine, network, environment, tokens)


def _tokens(datasets: Sequence[str]) -> tuple[TokenFile, ...]:
    """Nothing where what reads the files is missing, which the installation says."""
    if any(importlib.util.find_spec(package) is None for package in ("torch", "numpy", "msgspec")):
        return ()
    from fused_megatron.doctor.tokens import find_tokens  # noqa: PLC0415

    return find_tokens(datasets)
