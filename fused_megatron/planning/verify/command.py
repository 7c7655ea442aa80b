"""The command `fused-megatron verify`: its arguments, the printed result, the exit code."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_megatron.checks import InputError
from fused_megatron.config import TrainConfig
from fused_megatron.config.config_file import load_config, print_help
from fused_megatron.planning.verify.config_check import (
    RunLayout,
    check_starts_own_ranks,
    run_layout_on_ranks,
    verify_config,
)
from fused_megatron.planning.verify.planted import conclusion, find_fault, list_of_faults, verify_planted

USAGE = """usage: fused-megatron verify CONFIG.toml [--section.key value ...] [--all] [--dtype] [--json] [--against one]
       fused-megatron verify --plant list|NAME [CONFIG.toml [--section.key value ...]] [--json]

Checks that the layout of a config computes what one process computes: loss, outputs of modules, every gradient, their
norm, and the weights after three updates. It starts its own ranks on this machine (eight at most, no GPU) with a
reduced model of the same structure and random tokens; it does not read the config's data. docs/verify.md says what this
proves.

  --all           run every pair of the axes in use, one after the other (default: one run with three axes)
  --dtype         compute in the precision of the config (default: float32)
  --json          print the result as JSON
  --against one   compare the layout with one process, which is the only choice
  --plant NAME    plant a known fault into the ranks, of the config or of a run that shows it: an exercise. list: names

Exit code 0: the same (with --plant: the report names the fault); 1: it differs, or a rank failed; 2: bad input.
Keys of the config:
"""


@dataclass(frozen=True)
class VerifyOptions:
    """Parsed arguments of the command.

    Attributes:
        config: the config whose layout is verified; None: of a run that shows the planted fault, or none for a list.
        path: its file, as given.
        flags: the options without a value.
        plant: name of a fault, or "list"; None: nothing is planted.
    """

    config: TrainConfig | None
    path: str | None
    flags: frozenset[str]
    plant: str | None


def run_verify(words: Sequence[str], run: RunLayout = run_layout_on_ranks) -> int:
    """Verify a config and print the result; return 0 if the layout is right, otherwise 1.

    Args:
        words: arguments of the command line.
        run: as in verify_config.

    Raises:
        InputError: unknown arguments, no readable config, ranks that a launcher started.
    """
    if any(word in ("-h", "--help") for word in words):
        print(USAGE)
        print_help("fused-megatron verify CONFIG.toml", [word for word in words if word.startswith("--model.family")])
        return 0
    check_starts_own_ranks("verify")
    options = parse_options(words)
    if options.plant is not None:
        return _run_planted(options.plant, options)
    assert options.config is not None and options.path is not None
    result = verify_config(
        options.config, options.path, all_pairs="--all" in options.flags, own_dtype="--dtype" in options.flags, run=run
    )
    print(result.as_json() if "--json" in options.flags else result.table())
    return 0 if result.ok else 1


def parse_options(words: Sequence[str]) -> VerifyOptions:
    """Parse the arguments of `fused-megatron verify`.

    Raises:
        InputError: unknown arguments or an unknown fault, no readable config.
    """
    flags, plant, rest = _flags(words)
    if plant is None and (not rest or rest[0].startswith("-")):
        raise InputError("verify needs a config file first (a starting point: examples/gpt_tiny_3d.toml)")
    if plant not in (None, "list"):
        find_fault(plant)
        if wrong := sorted(flags - {"--json"}):
            raise InputError(f"{wrong[0]} does not go with --plant, which makes one run in float32")
    config = load_config(Path(rest[0]), rest[1:]) if rest and plant != "list" else None
    return VerifyOptions(config, rest[0] if rest else None, frozenset(flags), plant)


def _run_planted(name: str, options: VerifyOptions) -> int:
    """Print the faults, or the verification of a layout with a fault; return 0 if the report names it."""
    if name == "list":
        print(list_of_faults())
        return 0
    planted = find_fault(name)
    result = verify_planted(planted, options.config, *([] if options.path is None else [options.path]))
    text, named = conclusion(planted, result)
    print(result.as_json() if "--json" in options.flags else f"{result.table()}\n\n{text}")
    return 0 if named else 1


def _flags(words: Sequence[str]) -> tuple[set[str], str | None, list[str]]:
    """Split the arguments into the options of this command, the fault to plant, and the arguments of the config."""
    flags: set[str] = set()
    plant: str | None = None
    rest: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if name == "--against":
            value = value if equals else (waiting.pop(0) if waiting else "")
            if value != "one":
                raise InputError(f"--against={value!r:.40} must be 'one': a layout is compared with one process")
        elif name == "--plant":
            plant = value if equals else (waiting.pop(0) if waiting else "")
        elif name in ("--all", "--dtype", "--json"):
            if equals:
                raise InputError(f"{word} must be {name}: it takes no value")
            flags.add(name)
        else:
            rest.append(word)
    return flags, plant, rest
