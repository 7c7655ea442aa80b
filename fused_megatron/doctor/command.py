"""`fused-megatron doctor [--json]`. Its words are parsed by hand: what parses the other commands' may be missing."""

import os
from collections.abc import Sequence

from fused_megatron.checks import InputError
from fused_megatron.doctor.facts import Facts
from fused_megatron.doctor.findings import VARIABLES, find_out
from fused_megatron.doctor.installation import find_installation, find_library, find_torch
from fused_megatron.doctor.machine import Questions, find_machine, find_tools
from fused_megatron.doctor.ranks import Lookups, find_network
from fused_megatron.doctor.report import as_json, show, verdict

USAGE = """usage: fused-megatron doctor [--json]

What is installed, which kernels are compiled for which device, which backends and links are seen, what is missing and
the command that mends it. Exit code 0: this machine can train; 1: something is broken."""


def run_doctor(words: Sequence[str]) -> int:
    """Look, judge and print; 1 when something is broken.

    Raises:
        InputError: an unknown word.
    """
    if any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    unknown = [word for word in words if word != "--json"]
    if unknown:
        raise InputError(f"fused-megatron doctor: unknown option {unknown[0]} (options: --json)")
    facts = gather_facts()
    findings = find_out(facts)
    if words:
        print(as_json(facts, findings))
    else:
        show(facts, findings)
    return verdict(findings)[0]


def gather_facts() -> Facts:
    """Everything that the doctor looks at; what can hang is asked first and runs beside torch's import.

    Communication: two gloo ranks within this process.
    """
    questions, lookups = Questions(), Lookups()
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    installation = find_installation()
    torch = find_torch()
    library = find_library(torch.error is None, environment.get("FUSED_MEGATRON_LIBRARY"))
    network = find_network(lookups, gloo=torch.backends.get("gloo", False))
    return Facts(installation, torch, library, find_tools(questions), find_machine(questions), network, environment)
