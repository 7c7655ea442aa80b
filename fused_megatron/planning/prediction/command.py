"""The command `fused-megatron predict`: time, memory and cost of a training step on a cluster; errors against runs."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_megatron.checks import check
from fused_megatron.config import TrainConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.planning.amounts import parse_amount, parse_price, seconds_text
from fused_megatron.planning.command_line import (
    on_ranks,
    split_options,
    text_table,
    vocabulary_note,
    whole_number,
    with_vocabulary,
)
from fused_megatron.planning.engine_memory import device_memory
from fused_megatron.planning.prediction.cluster import Cluster, load_cluster
from fused_megatron.planning.prediction.engine import ENGINES, OWN, engine_of
from fused_megatron.planning.prediction.published_runs import read_runs
from fused_megatron.planning.prediction.step_figures import step_figures
from fused_megatron.planning.prediction.step_time import StepPrediction, predict_step
from fused_megatron.planning.prediction.trace import write_trace
from fused_megatron.planning.prediction.validation import Compared, by_fit, compare, mean_and_p95, regrets, summary
from fused_megatron.planning.search.pitfalls import pitfalls

USAGE = f"""usage: fused-megatron predict CONFIG.toml --cluster NAME|FILE [--section.key value ...] [options]
       fused-megatron predict --validate FILE.csv --cluster NAME|FILE [--engine NAME] [--rows] [--json]

Predicts a training step without a GPU: its time and parts with an error bar, tokens/s, MFU, memory, days and cost. Or
compares predictions with the measured steps of a CSV file.

options:
  --cluster C     name of a shipped cluster, or a unique prefix (a100-80gb, h100-80gb, h200, b200); or a file that
                  `fused-megatron calibrate` wrote
  --ranks N       number of ranks; the data-parallel size follows (default: the config's, or 1)
  --tokens N      tokens of the whole training, such as 100B: adds days, and the cost if --price is given
  --price P       price of a GPU hour, in any currency
  --engine E      the program that runs the step: {", ".join(ENGINES)}
  --trace FILE    write the predicted step for ui.perfetto.dev
  --validate FILE measured steps; --rows prints each row
  --json          print JSON

docs/planner.md explains the model of the time and its errors. All keys of a config: fused-megatron train --help"""
_WITH_VALUE = ("--cluster", "--ranks", "--tokens", "--price", "--engine", "--trace", "--validate")


@dataclass(frozen=True)
class PredictOptions:
    """Parsed arguments of the command.

    Attributes:
        cluster: the machine.
        given: the config as the user gave it; None: the runs of a file are predicted.
        runs: the file of runs; None: the config is predicted.
        num_ranks: ranks of the config; None: as few as its other axes need, unless it gives all of its sizes.
        engine: key of ENGINES; None: this package, or the engine of each run.
        tokens: of the whole training; None: no days.
        price: of a GPU hour; None: no cost.
        trace: file for the timeline; None: none.
        rows: print each run.
        as_json: print JSON.
    """

    cluster: Cluster
    given: TrainConfig | None
    runs: Path | None
    num_ranks: int | None
    engine: str | None
    tokens: int | None
    price: float | None
    trace: Path | None
    rows: bool
    as_json: bool


def run_predict(words: Sequence[str]) -> int:
    """Print the prediction, or the errors against a file of runs, and return the exit code.

    Raises:
        InputError: arguments, a config, a cluster or a file that do not fit.
    """
    if any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    options = parse_options(words)
    cluster, given = options.cluster, options.given
    if given is None:
        _validate(options)
        return 0
    config = with_vocabulary(given).for_device(cluster.device)
    if config.parallel.data_parallel_size is None or options.num_ranks is not None:
        least = dataclasses.replace(config.parallel, data_parallel_size=1).num_ranks
        config = on_ranks(config, least if options.num_ranks is None else options.num_ranks)
    engine = options.engine or OWN
    prediction = predict_step(config, cluster, engine=engine)
    facts = step_facts(config, cluster, prediction, engine=engine, tokens=options.tokens, price=options.price)
    if options.trace is not None:
        write_trace(prediction, options.trace)
    if options.as_json:
        print(json.dumps(facts, indent=2))
        return 0
    note = vocabulary_note(given)
    print(describe(config, cluster, prediction, facts) + (f"\n\nChosen: {note}" if note else ""))
    return 0


def parse_options(words: Sequence[str]) -> PredictOptions:
    """Parse the arguments of `fused-megatron predict`.

    Raises:
        InputError: no cluster or config, an option without its value, numbers that do not fit.
    """
    found, others = split_options(words, _WITH_VALUE, ("--json", "--rows"))
    check("--cluster" in found, "predict needs --cluster: a100-80gb, h100-80gb, h200, b200, or a file of calibrate")
    cluster = load_cluster(found["--cluster"])
    if "--engine" in found:
        engine_of(found["--engine"])
    if "--validate" in found:
        check(not others, f"{' '.join(others)!r:.60} does not go with --validate, which reads its runs from the file")
    else:
        check(
            len(others) > 0 and not others[0].startswith("-"),
            "predict needs a config file (a starting point: examples/gpt_tiny.toml)",
        )
    return PredictOptions(
        cluster,
        None if "--validate" in found else load_config(Path(others[0]), others[1:]),
        Path(found["--validate"]) if "--validate" in found else None,
        whole_number("--ranks", found["--ranks"]) if "--ranks" in found else None,
        found.get("--engine"),
        parse_amount("tokens", found["--tokens"]) if "--tokens" in found else None,
        parse_price(found["--price"]) if "--price" in found else None,
        Path(found["--trace"]) if "--trace" in found else None,
        "--rows" in found,
        "--json" in found,
    )


def step_facts(
    config: TrainConfig,
    cluster: Cluster,
    prediction: StepPrediction,
    *,
    engine: str = OWN,
    tokens: int | None = None,
    price: float | None = None,
) -> dict[str, Any]:
    """Return the prediction as plain values.

    Args:
        config: the run.
        cluster: the machine.
        prediction: of its step.
        engine: key of ENGINES, for the memory.
        tokens: of the whole training; None: no days.
        price: of a GPU hour; None: no cost.
    """
    memory = device_memory(config, cluster, engine)
    figures = step_figures(config, cluster, prediction, tokens, price)
    facts: dict[str, Any] = {name: value for name, value in figures.items() if value is not None}
    facts.pop("gpu_hours", None)
    return {
        **facts,
        "parts_s": prediction.parts,
        "gpus": config.parallel.num_ranks,
        "memory_gb": memory.total / 1e9,
        "memory_parts_gb": {name: num / 1e9 for name, num in {**memory.parts, **memory.overheads}.items()},
        "memory_of_gpu_gb": cluster.memory_gb,
        "outside": list(prediction.outside),
    }


def describe(config: TrainConfig, cluster: Cluster, prediction: StepPrediction, facts: dict[str, Any]) -> str:
    """Return the prediction as text."""
    parallel, least = config.parallel, min(0.05, 0.05 * facts["memory_gb"])
    lines = [
        f"{config.model.family.upper()} in {config.training.weight_dtype} on {facts['gpus']:,} {cluster.name} "
        f"(tp={parallel.tensor_parallel_size} pp={parallel.pipeline_parallel_size} dp={parallel.data_parallel_size}"
        f"{parallel.expert_text}{parallel.sequence_text}), {config.training.global_batch_size:,} x "
        f"{config.model.seq_len:,} tokens a step",
        f"step          {seconds_text(prediction.seconds)} ({seconds_text(prediction.low_s)} to "
        f"{seconds_text(prediction.high_s)})",
        f"tokens/s      {facts['tokens_per_s']:,.0f}",
        f"MFU           {facts['mfu']:.1%}",
        f"memory        {_gb(facts['memory_gb'])} GB of {cluster.memory_gb:.4g} GB on the fullest GPU: "
        + ", ".join(f"{name} {_gb(size)}" for name, size in facts["memory_parts_gb"].items() if size >= least),
    ]
    if measured := cluster.measured_block(config):
        lines.append(f"blocks        {measured.factor:.3f} x the constants, from {len(measured.rows)} measured step(s)")
    if facts["memory_gb"] > cluster.memory_gb:
        excess = facts["memory_gb"] - cluster.memory_gb
        lines.append(f"              does not fit: {excess:.1f} GB too much (fused-megatron plan finds a layout)")
    if "days" in facts:
        lines.append(
            f"training      {facts['days']:,.2f} days" + (f", cost {facts['cost']:,.0f}" if "cost" in facts else "")
        )
    rows = [["part", "time", "share"]]
    for name, seconds in prediction.parts.items():
        if seconds > 1e-6 * prediction.seconds:
            rows.append([name, seconds_text(seconds), f"{seconds / prediction.seconds:.1%}"])
    lines += ["", *text_table(rows)]
    if prediction.outside:
        lines += ["", "Outside of the runs behind the constants, so the error bar is wider:"]
        lines += [f"  {text}" for text in prediction.outside]
    if warnings := pitfalls(config, cluster):
        lines += ["", *(f"warning: {text}" for text in warnings)]
    return "\n".join(lines)


def _gb(size: float) -> str:
    """Return a size in GB, small ones with two digits."""
    return f"{size:.1f}" if size >= 1 else f"{size:.2g}"


def _validate(options: PredictOptions) -> None:
    path, cluster = options.runs, options.cluster
    assert path is not None
    compared = compare(read_runs(path), cluster, options.engine)
    groups = by_fit(compared)
    choices = regrets(compared)
    if options.as_json:
        print(json.dumps(_errors_json(compared, groups, choices), indent=2))
        return
    print(f"{path.name} on {cluster.name}: predicted / measured - 1, in percent")
    print("\n".join(error_table(groups)))
    if choices:
        mean, p95 = mean_and_p95(choices)
        print(
            f"\nThe layout predicted to be fastest, over the fastest measured one, in {len(choices)} workloads: "
            f"mean {mean:+.1%}, 95 % of them {p95:+.1%}, worst {max(choices):+.1%}"
        )
    if options.rows:
        rows = [["row", "measured", "predicted", "error", "rows"]]
        for row in compared:
            times = (seconds_text(row.run.seconds), seconds_text(row.prediction.seconds))
            rows.append([row.run.name, *times, f"{row.error:+.1%}", "fitted" if row.fitted else "held out"])
        print("\n" + "\n".join(text_table(rows)))


def error_table(groups: dict[str, list[Compared]]) -> list[str]:
    """Return a table of errors, one line for each group that has rows."""
    rows = [["rows", "number", "mean", "median", "95 %", "largest", "bias"]]
    for name, members in groups.items():
        errors = summary(members)
        if errors is not None:
            sizes = (errors.mean, errors.median, errors.p95, errors.largest)
            rows.append(
                [name, f"{errors.number:,}", *(f"{100 * size:.1f}" for size in sizes), f"{100 * errors.bias:+.1f}"]
            )
    return text_table(rows)


def _errors_json(compared: list[Compared], groups: dict[str, list[Compared]], choices: list[float]) -> dict[str, Any]:
    errors = {name: summary(members) for name, members in groups.items()}
    return {
        "errors": {name: None if one is None else dataclasses.asdict(one) for name, one in errors.items()},
        "regret": None if not choices else dict(zip(("mean", "p95"), mean_and_p95(choices), strict=True)),
        "rows": [
            {
                "name": row.run.name,
                "measured_s": row.run.seconds,
                "predicted_s": row.prediction.seconds,
                "fitted": row.fitted,
            }
            for row in compared
        ],
    }
