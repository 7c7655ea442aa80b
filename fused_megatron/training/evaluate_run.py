"""The command `fused-megatron evaluate`: held-out loss and perplexity of a run's checkpoint, at any layout."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fused_megatron.assembly.assemble import Assembly, assemble
from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.checkpoint import load_checkpoint, newest_checkpoint
from fused_megatron.checkpoint.model_state import buffer_boxes, parameter_boxes
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checkpoint.run_state import read_run_state
from fused_megatron.checks import InputError, check
from fused_megatron.collectives.together import gather_json
from fused_megatron.config import OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.data.training_data import open_held_out_data
from fused_megatron.pipeline.schedule.schedules import ASYNCHRONOUS
from fused_megatron.planning.command_line import split_options, whole_number
from fused_megatron.training.device_settings import on_device
from fused_megatron.training.evaluation import Evaluation, evaluate
from fused_megatron.training.process_group import ThisRank, joined_ranks, on_every_rank, world_group
from fused_megatron.training.progress import Reporter
from fused_megatron.training.same_start import check_same_data

USAGE = """usage: fused-megatron evaluate RUN [--section.key value ...] [options]

Loss, perplexity and bits per byte of the newest good checkpoint of a run. By default on the text that the run held
out; on another text (--data.path TEXT) on all of it. The layout of training does not matter:
  fused-megatron evaluate runs/my --data.path other.txt
  fused-megatron launch --nproc-per-node 2 evaluate runs/my --parallel.tensor-parallel-size 2

options:
  --part PART        held-out or all of the text
  --max-samples N    most samples, evenly spread (default: all)
  --json             print JSON

All keys of a config: fused-megatron train --help"""


@dataclass(frozen=True)
class EvaluateOptions:
    """Parsed arguments of the command.

    Attributes:
        run: the run folder.
        overrides: options that change keys of its config.
        everything: evaluate on all of the text.
        max_samples: most samples; None: all.
        as_json: print JSON instead of a table.
    """

    run: Path
    overrides: tuple[str, ...]
    everything: bool
    max_samples: int | None
    as_json: bool


def parse_options(words: Sequence[str]) -> EvaluateOptions:
    """Parse the arguments of `fused-megatron evaluate`."""
    found, others = split_options(words, ("--part", "--max-samples"), ("--json",))
    check(bool(others) and not others[0].startswith("-"), "evaluate needs a run folder first: evaluate runs/my")
    overrides = tuple(others[1:])
    other_text = any(word.partition("=")[0] == "--data.path" for word in overrides)
    part = found.get("--part", "all" if other_text else "held-out")
    check(part in ("all", "held-out"), f"--part={part} must be all or held-out")
    most = whole_number("--max-samples", found["--max-samples"]) if "--max-samples" in found else None
    check(most is None or most > 0, "--max-samples=0 must be 1 or more")
    return EvaluateOptions(Path(others[0]), overrides, part == "all", most, "--json" in found)


def evaluate_run(options: EvaluateOptions) -> Evaluation:
    """Evaluate, print the result on rank 0, and return it. Every rank must call this.

    Raises:
        InputError: no run, no good checkpoint, or data, layout or a key that does not fit.
    """
    run = RunFolder(options.run)
    with joined_ranks(ParallelConfig().timeout_s) as this_rank:
        reporter = Reporter(this_rank.rank == 0 and not options.as_json, 1)
        checkpoint = newest_checkpoint(run.checkpoints, group=world_group())
        config = on_every_rank(lambda: _config_of(run, checkpoint, options, this_rank))
        assert checkpoint is not None
        data = on_every_rank(
            lambda: open_held_out_data(
                config, reporter.stage, everything=options.everything, max_samples=options.max_samples
            )
        )
        contents = gather_json(dict(data.content), world_group())
        on_every_rank(lambda: check_same_data(*contents))
        config = on_device(config, this_rank.device.type)
        mesh = on_every_rank(lambda: build_mesh(config, this_rank.device.type))
        plan = plan_pipeline(config)
        config = replace(config, training=_whole_batches(config, mesh.dp_size))
        assembly = assemble(config, mesh, plan, build_stages(config, mesh, plan, this_rank.device))
        _load_weights(assembly, checkpoint)
        reporter.say(f"{checkpoint}, {this_rank.world_size} {this_rank.device.type} rank(s), {data.description}")
        assembly.model.eval()
        evaluation = evaluate(assembly, data)
        assembly.executor.close()
        if this_rank.rank == 0:
            _print(evaluation, checkpoint, data.description, reporter, options.as_json)
        return evaluation


def _config_of(run: RunFolder, checkpoint: Path | None, options: EvaluateOptions, this_rank: ThisRank) -> TrainConfig:
    """Return the config of the run with the overrides, in a layout for the ranks that are here."""
    run.check_exists()
    if checkpoint is None:
        raise InputError(f"{run.checkpoints} holds no checkpoint that verifies (train first)")
    own_tokenizer = (f"--data.tokenizer-path={run.tokenizer}",) if run.tokenizer.exists() else ()
    chosen = {word.partition("=")[0].replace("-", "_") for word in options.overrides}
    # The weights of the run belong to its own texts.
    no_weights = ("--data.weights=none",) if "__data.path" in chosen else ()
    config = load_config(run.config, (*own_tokenizer, *no_weights, *options.overrides))
    parallel = config.parallel
    if "__parallel.data_parallel_size" not in chosen:
        parallel = replace(parallel, data_parallel_size=None)
    model_ranks = replace(parallel, data_parallel_size=1).num_ranks
    if this_rank.world_size % model_ranks and not any(name.startswith("__parallel.") for name in chosen):
        parallel = ParallelConfig(timeout_s=parallel.timeout_s)  # the ranks that are here read different samples
    if parallel.schedule in ASYNCHRONOUS:
        parallel = replace(parallel, schedule=None)  # forwards are the same
    model = replace(config.model, vocab_size=read_run_state(checkpoint)["vocab_size"])
    # No moments: they would take twice the memory of the weights.
    optimizer = OptimizerConfig(kind="sgd", momentum=0.0)
    config = replace(config, parallel=parallel, model=model, optimizer=optimizer)
    config.model.check_trainable()
    return config


def _whole_batches(config: TrainConfig, dp_size: int) -> TrainingConfig:
    """Return the settings with a global batch that the data-parallel ranks can divide."""
    training = config.training
    unit = training.microbatch_size * dp_size
    return replace(training, global_batch_size=max(1, training.global_batch_size // unit) * unit)


def _load_weights(assembly: Assembly, checkpoint: Path) -> None:
    rows = assembly.gradients.replicas.rows
    boxes = parameter_boxes(assembly.parameters, assembly.own_weights, rows)
    for stage in assembly.model.stages.values():
        boxes = {**boxes, **buffer_boxes(stage)}
    # The state of routers beside their weights is of training; their biases are loaded where the run has them.
    load_checkpoint(
        checkpoint,
        boxes,
        group=world_group(),
        allow_missing=("*.router.previous_load",),
        allow_extra=("optimizer.*", "*.router.previous_load"),
    )
    assembly.weights.start()


def _print(evaluation: Evaluation, checkpoint: Path, text: str, reporter: Reporter, as_json: bool) -> None:
    if as_json:
        record = {
            "checkpoint": str(checkpoint),
            "text": text,
            "loss": evaluation.validation_loss,
            "perplexity": evaluation.perplexity,
            "bits_per_byte": evaluation.bits_per_byte,
            "tokens": evaluation.validation_tokens,
        }
        print(json.dumps(record))
        return
    rows = {
        "loss": f"{evaluation.validation_loss:.4f} nats per token",
        "perplexity": f"{evaluation.perplexity:,.2f}",
        "tokens": f"{evaluation.validation_tokens:,}",
    }
    if evaluation.bits_per_byte is not None:
        rows["bits per byte"] = f"{evaluation.bits_per_byte:.4f}"
    reporter.table("Evaluation", rows)
