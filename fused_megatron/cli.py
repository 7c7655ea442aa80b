"""The command line `fused-megatron`, with one sub-command for each job. Bad input ends with one line and exit code 2.

Each command imports only what it needs: `schedule` and `--help` start without torch, and `doctor` works even if torch
or another dependency is missing.
"""

import contextlib
import errno
import importlib.metadata
import os
import re
import select
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from fused_megatron.checks import InputError, SharedError, SharedInputError
from fused_megatron.training.error_line import end_now, print_error, prints_for_host

if TYPE_CHECKING:
    from fused_megatron.config import TrainConfig

USAGE = """usage: fused-megatron COMMAND ...

commands:
  init CONFIG.toml [--like llama|gpt|bert|moe]  write a config that trains, with every key and its meaning
  train CONFIG.toml [--section.key value ...]   train a GPT or BERT; `train --help` lists all keys; --profile STEPS
  evaluate RUN [--data.path TEXT ...]           loss and perplexity of a run's newest checkpoint, on any text
  preprocess FILES.. --output PREFIX [..]       text to a dataset of token ids, by all cores; resumable
  launch --nproc-per-node N COMMAND ...         N ranks of a command, such as train, on this machine
  launch slurm|kubernetes CONFIG --nodes N      print the file that trains a config on a cluster
  generate RUN "prompt" ... [--num-tokens N]    continue prompts with a run's newest checkpoint
  convert from-hf FOLDER RUN | to-hf RUN FOLDER a model of Hugging Face transformers to a run, and back
  verify CONFIG.toml [--all] [--json]           whether a layout computes what one process does, without GPUs
  schedule show|check|simulate NAME ...         pipeline schedules: pictures, rules, bubble and memory
  plan MODEL --cluster NAME --gpus N [...]      fastest layout of a model on a cluster, as a config that starts
  dry-run CONFIG [--ranks N] [--rank R]         memory, FLOPs and transfers of any layout, without a GPU
  predict CONFIG --cluster NAME|FILE [..]       time, memory and cost of a step on a cluster, without a GPU
  calibrate [--ranks N] [--output FILE]         speeds of this machine, as a cluster file for predictions
  experiment list|show|run|all [ID ...]         experiments of the papers: measured here, predicted there
  doctor [--json] [--config CONFIG.toml]        state of the installation, faults, and how to mend them
  report FILE...                                benchmark results as tables and plots; two runs compared
  audit [--op OP] [--arch ARCH] [--write FILE]  cost of the GPU kernels, found without a GPU
  audit --step CONFIG.toml [--write PAGE.md]    kernels, bytes, waits and collectives of a step on GPUs

Several machines: torchrun .. -m fused_megatron train CONFIG.toml ..."""

T = TypeVar("T")

# Time to wait for the other ranks, which may still be importing.
_ERROR_TIMEOUT_S = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done. 1: failed. 2: bad input. 129: the terminal is gone. 130: interrupted. 141: the output pipe is closed.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _discard_closed_output():
            raise
        return 141  # like a program that SIGPIPE ends, as in `| head -1`
    except OSError as error:
        if error.errno != errno.EIO or not sys.stdout.isatty() or not _discard_closed_output():
            raise
        return 129  # like a program that SIGHUP ends: the terminal is gone
    return code


def _run(argv: Sequence[str]) -> int:
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(_version())
        return 0
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "init": _init,
        "train": _train,
        "evaluate": _evaluate,
        "preprocess": _preprocess,
        "launch": _launch,
        "generate": _generate,
        "convert": _convert,
        "verify": _verify,
        "schedule": _schedule,
        "plan": _plan,
        "dry-run": _dry_run,
        "predict": _predict,
        "calibrate": _calibrate,
        "experiment": _experiment,
        "doctor": _doctor,
        "report": _report,
        "audit": _audit,
    }
    try:
        if command not in commands:
            raise SharedInputError(f"unknown command {command!r} (commands: {', '.join(commands)})")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return commands[command](argv[1:])
    except InputError as error:
        return _fail(error, 2)
    except RuntimeError as error:
        if not _is_expected(error):
            raise  # a bug of ours: its traceback is worth more than a line
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail(KeyboardInterrupt("interrupted; the same command goes on from what is saved"), 130)


def _version() -> str:
    try:
        return importlib.metadata.version("fused-megatron")
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path
        return "(not installed)"


def _discard_closed_output() -> bool:
    """Return whether the output is closed; if so, discard all further output, also at the end of the process."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _init(argv: Sequence[str]) -> int:
    from fused_megatron.config.starting_config import InitArguments, write_starting_config  # noqa: PLC0415

    arguments = _parse(InitArguments, "init", argv)
    if arguments is not None:
        print("\n".join(write_starting_config(arguments)))
    return 0


def _train(argv: Sequence[str]) -> int:
    from fused_megatron.training.stop_request import StopRequest  # noqa: PLC0415

    stop = StopRequest()  # before the long imports, during which the launcher may be killed
    if prints_for_host() and os.environ.get("RANK", "0") == "0" and not {"-h", "--help"} & {*argv}:
        # Loading torch takes seconds, on a busy machine many: the user sees at once that something happens.
        print(f"fused-megatron {_version()}: train {' '.join(argv[:1])}; loading PyTorch ...", flush=True)
    from fused_megatron.checkpoint import list_checkpoints  # noqa: PLC0415
    from fused_megatron.checkpoint.run_folder import RunFolder  # noqa: PLC0415
    from fused_megatron.config.config_file import print_help  # noqa: PLC0415
    from fused_megatron.training.presence import LostRankError, lost_contact, reason_of  # noqa: PLC0415
    from fused_megatron.training.train import train  # noqa: PLC0415
    from fused_megatron.training.trainer import TrainingError  # noqa: PLC0415

    if any(argument in ("-h", "--help") for argument in argv):
        print_help("fused-megatron train CONFIG.toml", argv)
        return 0
    with _shared_errors():
        config = parse_train(argv)
    run = RunFolder(Path(config.training.run_folder or ""))
    try:
        finished = train(config, run.path, stop)
    except RuntimeError as error:
        if isinstance(error, TrainingError) or not (lost_contact(error) and "RANK" in os.environ):
            raise
        lost = isinstance(error, LostRankError)
        found = str(error) if lost else f"lost contact with another rank ({reason_of(error)})"
        # Without verifying its checksums, so that the line comes at once; the resumed run verifies them.
        try:
            newest = next((str(path) for path in list_checkpoints(run.checkpoints)), "none")
        except InputError:
            newest = "unknown"
        end_now(f"{found}; newest checkpoint: {newest}; the same command resumes from the newest good one")
    stop.end(ignore=not finished)  # a late signal must not make a run fail that has saved everything
    return 0 if finished else stop.exit_code


def parse_train(argv: Sequence[str]) -> "TrainConfig":
    """Return the config of the arguments of `train`.

    Raises:
        InputError: no config, or a key that does not fit.
    """
    from fused_megatron.config.config_file import load_config, with_run_folder  # noqa: PLC0415

    if not argv or argv[0].startswith("-"):
        raise InputError("train needs a config file first (to write one: fused-megatron init my.toml)")
    words = [re.sub("^--profile(?==|$)", "--training.profile-steps", word) for word in argv[1:]]
    return with_run_folder(load_config(Path(argv[0]), words), Path(argv[0]))


def _evaluate(argv: Sequence[str]) -> int:
    from fused_megatron.training.evaluate_run import USAGE as HELP  # noqa: PLC0415
    from fused_megatron.training.evaluate_run import evaluate_run, parse_options  # noqa: PLC0415

    if any(argument in ("-h", "--help") for argument in argv):
        print(HELP)
        return 0
    with _shared_errors():
        options = parse_options(argv)
    evaluate_run(options)
    return 0


def _preprocess(argv: Sequence[str]) -> int:
    from fused_megatron.data.preprocess import PreprocessArguments, preprocess  # noqa: PLC0415
    from fused_megatron.training.progress import Reporter  # noqa: PLC0415

    arguments = _parse(PreprocessArguments, "preprocess", argv)
    if arguments is not None:
        reporter = Reporter(True, 1)
        result = preprocess(arguments, reporter.say)
        reporter.say(f"{arguments.output}.bin: {result.num_documents:,} documents, {result.num_tokens:,} tokens")
        reporter.say(f"to train: --data.path {arguments.output} --data.tokenizer-path {result.tokenizer}")
    return 0


def _launch(argv: Sequence[str]) -> int:
    from fused_megatron.training.launcher import launch  # noqa: PLC0415

    if argv and argv[0] in ("slurm", "kubernetes"):
        from fused_megatron.planning.job_files.command import run_launch  # noqa: PLC0415

        return run_launch(argv)
    return launch(argv)


def _generate(argv: Sequence[str]) -> int:
    from fused_megatron.training.generate_text import GenerateArguments, generate_text  # noqa: PLC0415

    arguments = _parse(GenerateArguments, "generate", argv, on_ranks=True)
    if arguments is not None:
        generate_text(arguments, show=lambda piece: print(piece, end="", flush=True))
        if os.environ.get("RANK", "0") == "0":
            print()
    return 0


def _convert(argv: Sequence[str]) -> int:
    from fused_megatron.training.convert import ConvertArguments, convert  # noqa: PLC0415

    arguments = _parse(ConvertArguments, "convert", argv, on_ranks=True)
    if arguments is not None:
        convert(arguments)
    return 0


def _verify(argv: Sequence[str]) -> int:
    from fused_megatron.planning.verify.command import run_verify  # noqa: PLC0415

    return run_verify(argv)


def _schedule(argv: Sequence[str]) -> int:
    from fused_megatron.pipeline.command import ScheduleArguments, run_schedule  # noqa: PLC0415

    arguments = _parse(ScheduleArguments, "schedule", argv)
    return 0 if arguments is None else run_schedule(arguments)


def _plan(argv: Sequence[str]) -> int:
    from fused_megatron.planning.search.plan_command import run_plan  # noqa: PLC0415

    return run_plan(argv)


def _dry_run(argv: Sequence[str]) -> int:
    from fused_megatron.planning.dry_run_command import run_dry_run  # noqa: PLC0415

    return run_dry_run(argv)


def _predict(argv: Sequence[str]) -> int:
    from fused_megatron.planning.prediction.command import run_predict  # noqa: PLC0415

    return run_predict(argv)


def _calibrate(argv: Sequence[str]) -> int:
    from fused_megatron.planning.prediction.calibrate_command import (  # noqa: PLC0415
        CalibrateArguments,
        run_calibrate,
    )

    arguments = _parse(CalibrateArguments, "calibrate", argv)
    return 0 if arguments is None else run_calibrate(arguments)


def _experiment(argv: Sequence[str]) -> int:
    from fused_megatron.experiments.command import ExperimentArguments, run_experiment_command  # noqa: PLC0415

    arguments = _parse(ExperimentArguments, "experiment", argv)
    return 0 if arguments is None else run_experiment_command(arguments)


def _doctor(argv: Sequence[str]) -> int:
    from fused_megatron.doctor.command import run_doctor  # noqa: PLC0415

    return run_doctor(argv)


def _report(argv: Sequence[str]) -> int:
    from fused_megatron.benchmarking.report.command import ReportArguments, run_report  # noqa: PLC0415

    arguments = _parse(ReportArguments, "report", argv)
    return 0 if arguments is None else run_report(arguments)


def _audit(argv: Sequence[str]) -> int:
    if any(word.partition("=")[0] == "--step" for word in argv):
        from fused_megatron.audit.step_command import run_step_audit  # noqa: PLC0415

        return run_step_audit(argv)
    # Needs a source checkout and its compilers, which most users do not have: imported only here.
    from fused_megatron.audit.command import AuditArguments, run_audit  # noqa: PLC0415

    arguments = _parse(AuditArguments, "audit", argv)
    return 0 if arguments is None else run_audit(arguments)


def _parse(target: type[T], command: str, argv: Sequence[str], on_ranks: bool = False) -> T | None:
    """Parse the arguments of a command; print the help and return None if they ask for help.

    Args:
        target: class of the parsed arguments.
        command: its name.
        argv: its arguments.
        on_ranks: True for a command that several ranks run with the same arguments: only one rank prints an error.
    """
    from fused_megatron.config.arguments import parse_arguments, print_arguments  # noqa: PLC0415

    program = f"fused-megatron {command}"
    if any(argument in ("-h", "--help") for argument in argv):
        print_arguments(target, program)
        return None
    with _shared_errors() if on_ranks else contextlib.nullcontext():
        return parse_arguments(target, argv, source=program)


@contextlib.contextmanager
def _shared_errors() -> Iterator[None]:
    """Raise an InputError of this block, in which a rank reads its arguments and files, on every launched rank."""
    from fused_megatron.training.scheduler import set_rank_variables  # noqa: PLC0415

    set_rank_variables()
    try:
        yield
    except InputError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        from fused_megatron.training.process_group import joined_ranks  # noqa: PLC0415

        with joined_ranks(_ERROR_TIMEOUT_S, error):
            raise AssertionError("joined_ranks raises the error that it gets") from error


def _is_expected(error: RuntimeError) -> bool:
    """Return whether the error is meant for the user, so that its one line is enough."""
    from fused_megatron.checkpoint import CheckpointError  # noqa: PLC0415
    from fused_megatron.training.out_of_memory import MemoryShortageError  # noqa: PLC0415
    from fused_megatron.training.trainer import TrainingError  # noqa: PLC0415

    # Possible causes of a CheckpointError; anything else is a bug.
    causes = InputError | CheckpointError | OSError | RuntimeError | None
    if isinstance(error, MemoryShortageError):
        return True
    return isinstance(error, (TrainingError, CheckpointError)) and isinstance(error.__cause__, causes)


def _fail(error: BaseException, code: int) -> int:
    if prints_for_host() or not isinstance(error, SharedError | KeyboardInterrupt):
        print_error(str(error))
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning; our own (RuntimeWarning), which are meant for the user, without the line of source."""
    with contextlib.suppress(OSError):  # a terminal that is gone
        if category is RuntimeWarning:
            print(f"fused-megatron: warning: {message}", file=sys.stderr, flush=True)
        else:
            print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)
