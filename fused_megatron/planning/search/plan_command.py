"""The command `fused-megatron plan`: its arguments, the report, the written config."""

import dataclasses
import gc
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fused_megatron.checks import InputError, check, check_positive
from fused_megatron.config import TrainConfig
from fused_megatron.config.config_file import config_text, load_config
from fused_megatron.durable import check_can_write
from fused_megatron.planning.amounts import parse_amount, parse_price
from fused_megatron.planning.command_line import layout_words, split_options, whole_number
from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.search.best_layouts import Plan, find_best
from fused_megatron.planning.search.fewest_gpus import Fit, fewest_gpus
from fused_megatron.planning.search.layouts import check_gpus
from fused_megatron.planning.search.model_source import read_workload
from fused_megatron.planning.search.pitfalls import pitfalls
from fused_megatron.planning.search.plan_report import Request, as_json, describe, does_not_fit

USAGE = """usage: fused-megatron plan MODEL --cluster NAME|FILE --gpus N [options] [--section.key value ...]

Searches the fastest layout of a model on a cluster: tensor, pipeline, context, data and expert parallelism, schedule,
microbatches, recomputation and ZeRO stage. It needs no GPU, data or network. Prints the ten best layouts with the
predicted time of a step and its parts, the memory, and why other layouts fell. docs/planner.md says how.

MODEL: a config (.toml; its [parallel] is not used, --section.key changes it), a folder with a config.json of
transformers (no weights are needed), or, in a source checkout, the name or prefix of a file in benchmarks/presets.

options:
  --cluster NAME|FILE  shipped cluster (a prefix will do) or a cluster file (.toml; fused-megatron calibrate)
  --gpus N             number of GPUs: at most one node's, or whole nodes
  --tokens AMOUNT      tokens of the whole training, such as 100B: prints days and GPU hours, sets training.num_steps
  --seq-len N          tokens of a sequence (default: the config's; of a folder, its longest up to 8,192)
  --batch-tokens N     tokens of a step, in whole sequences (default: the config's batch; of a folder, 4,194,304)
  --price AMOUNT       price of a GPU hour: prints the cost of the training
  --write FILE         write the best plan as a config and verify it (fused-megatron verify, about a minute)
  --no-verify          with --write: write without verifying
  --json               print JSON

Exit code 0: there is a plan; 1: the model does not fit, or the plan failed its verification; 2: bad input."""

_VALUES = ("--cluster", "--gpus", "--tokens", "--seq-len", "--batch-tokens", "--price", "--write")
_FLAGS = ("--json", "--no-verify")


@dataclass(frozen=True)
class PlanOptions:
    """Parsed arguments of the command.

    Attributes:
        request: model, batch, cluster, GPUs, tokens and price.
        write: file for the config; None: none.
        verify: whether to verify the written config.
        as_json: print JSON.
        source: the config whose layout was searched, if options can say the plan; None: only a new file can.
        overrides: options of the config.
    """

    request: Request
    write: Path | None
    verify: bool
    as_json: bool
    source: Path | None = None
    overrides: tuple[str, ...] = ()


@contextmanager
def _no_cycles_collected() -> Iterator[None]:
    """Do not look for cycles of garbage: a search makes millions of small objects, and looking takes a fifth of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def run_plan(words: Sequence[str]) -> int:
    """Plan, print the report, and return the exit code.

    Raises:
        InputError: arguments, a model or a cluster that do not fit.
    """
    if any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    options = parse_options(words)
    request = options.request
    workload, cluster = request.workload.config, request.cluster
    nearest: Fit | None = None
    with _no_cycles_collected():
        search = find_best(workload, request.num_gpus, cluster)
        if not search.plans and search.too_large:
            nearest = fewest_gpus(workload, cluster, request.num_gpus)
    if not search.plans:
        if options.as_json:
            print(json.dumps(as_json(search, request, nearest, {}), indent=2))
        else:
            print(does_not_fit(search, request, nearest))
        return 1
    best = search.plans[0]
    config = _with_steps(best.config, request)
    warnings, command = pitfalls(config, request.cluster), start_command(request, _train_words(options, best.config))
    if not options.as_json:
        print(describe(search, request))
        print("".join(f"\nwarning: {warning}" for warning in warnings), end="\n" if warnings else "")
    written = _write(options, config, best, command) if options.write is not None else None
    if options.as_json:
        extra = {"warnings": warnings, "command": command, "config": config_text(config), "verified": written}
        print(json.dumps(as_json(search, request, None, extra), indent=2))
    else:
        print(_conclusion(options, command, written))
    return 1 if written == "failed" else 0


def parse_options(words: Sequence[str]) -> PlanOptions:
    """Parse the arguments of `fused-megatron plan`.

    Raises:
        InputError: an argument is missing or malformed, no such cluster or model, GPUs that its nodes do not have.
    """
    check(
        len(words) > 0 and not words[0].startswith("-"),
        "plan needs a model first: a config (.toml), a folder with a config.json of transformers, or a preset's name",
    )
    found, overrides = split_options(words[1:], _VALUES, _FLAGS)
    cluster = load_cluster(_required("--cluster", found, "such as h100"))
    num_gpus = _number("gpus", _required("--gpus", found, "such as 64"))
    check_gpus(num_gpus, cluster)
    tokens, batch = (_amount(name, found) for name in ("--tokens", "--batch-tokens"))
    write = Path(found["--write"]) if "--write" in found else None
    if write is not None:
        check(write.suffix == ".toml", f"write={str(write)!r:.80} must be the name of a .toml file")
        check_can_write("write", write)
    workload = read_workload(
        words[0],
        overrides,
        num_gpus=num_gpus,
        seq_len=_number("seq_len", found["--seq-len"]) if "--seq-len" in found else None,
        batch_tokens=batch,
        dtype="float32" if cluster.device == "cpu" else "bfloat16",
    )
    workload = dataclasses.replace(workload, config=workload.config.for_device(cluster.device))
    price = parse_price(found["--price"]) if "--price" in found else None
    request = Request(workload, cluster, num_gpus, tokens, price)
    # The plan is this config in another layout: options say it, and no new file is needed.
    only_layout = words[0].endswith(".toml") and not {"--seq-len", "--batch-tokens", "--tokens"} & set(found)
    return PlanOptions(
        request,
        write,
        "--no-verify" not in found,
        "--json" in found,
        Path(words[0]) if only_layout else None,
        tuple(overrides),
    )


def _train_words(options: PlanOptions, planned: TrainConfig) -> list[str]:
    """Return the words behind `train` that start the plan."""
    if options.write is not None:
        return [str(options.write)]
    if options.source is None:
        return ["FILE.toml"]
    own = load_config(options.source, options.overrides)
    return [str(options.source), *options.overrides, *layout_words(own, planned)]


def _required(name: str, found: dict[str, str], example: str) -> str:
    check(name in found, f"plan needs {name} ({example})")
    return found[name]


def _number(name: str, text: str) -> int:
    number = whole_number(name, text)
    check_positive(name, number)
    return number


def _amount(name: str, found: dict[str, str]) -> int | None:
    return parse_amount(name[2:].replace("-", "_"), found[name]) if name in found else None


def _with_steps(config: TrainConfig, request: Request) -> TrainConfig:
    """Return the config with the steps that the tokens of the training take."""
    if request.tokens is None:
        return config
    steps = math.ceil(request.tokens / request.workload.batch_tokens)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=steps))


def start_command(request: Request, train_words: Sequence[str]) -> str:
    """Return the command that starts the plan's ranks; train_words stand behind `train`."""
    node, train = request.cluster.gpus_per_node, shlex.join(train_words)
    if request.num_gpus <= node:
        return f"torchrun --nnodes 1 --nproc-per-node {request.num_gpus} -m fused_megatron train {train}"
    nodes = request.num_gpus // node
    return (
        f"torchrun --nnodes {nodes} --nproc-per-node {node} --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
        f"-m fused_megatron train {train}"
    )


def _write(options: PlanOptions, config: TrainConfig, plan: Plan, command: str) -> str:
    """Verify the config and write it; return "yes", "no" or "failed"."""
    verified = "no"
    if options.verify:
        from fused_megatron.planning.verify.config_check import (  # noqa: PLC0415 - it starts ranks, with torch
            check_starts_own_ranks,
            verify_config,
        )

        check_starts_own_ranks("plan")
        result = verify_config(config, str(options.write))
        verified = "yes" if result.ok else "failed"
        if not result.ok:
            print(result.table())
    request, memory_gb = options.request, plan.memory_bytes / 1e9
    head = [
        f"{request.workload.name} on {request.num_gpus:,} x {request.cluster.name}: fused-megatron plan",
        f"predicted: {plan.prediction.seconds:.3f} s a step, {memory_gb:.1f} GB of {request.cluster.memory_gb:g} GB",
        command,
    ]
    assert options.write is not None
    try:
        options.write.write_text("".join(f"# {line}\n" for line in head) + "\n" + config_text(config), encoding="utf-8")
    except OSError as error:
        raise InputError(f"write={str(options.write)!r:.80} cannot be written: {error.strerror}") from None
    return verified


def _conclusion(options: PlanOptions, command: str, written: str | None) -> str:
    """Return what the user does next."""
    if written is None:
        return (
            f"\nnot verified yet (plan ... --write FILE.toml writes this config and verifies it); start:\n  {command}"
        )
    if written == "failed":
        return f"\n{options.write}: FAILED its verification: it does not compute what one process computes"
    if written == "no":
        return f"\n{options.write}: not verified yet (fused-megatron verify {options.write}); start:\n  {command}"
    return f"\n{options.write} is ready: verified, it computes what one process computes; start:\n  {command}"
