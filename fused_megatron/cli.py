"""`fused-megatron`: one sub-command per job. Bad input ends with one line and exit code 2.

Each command imports what it needs: `schedule` and `--help` answer before torch would be loaded, and `doctor` answers
where torch or another dependency is missing.
"""

import contextlib
import errno
import importlib.metadata
import os
import select
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

from fused_megatron.checks import InputError, SharedError, SharedInputError
from fused_megatron.training.error_line import end_now, say_error, speaks_for_host

USAGE = """usage: fused-megatron COMMAND ...

commands:
  train CONFIG.toml [--section.key value ...]   train a GPT or BERT; `train --help` lists all keys
  launch --nproc-per-node N COMMAND ...         N ranks of train, generate or convert on this machine
  generate RUN "prompt" [--num-tokens N ...]    continue a prompt from a run's newest checkpoint
  convert from-hf FOLDER RUN | to-hf RUN FOLDER a model of Hugging Face transformers to a run, and back
  schedule show|check|simulate NAME ...         pipeline schedules: pictures, rules, bubble and memory
  dry-run CONFIG [--ranks N] [--rank R]         memory, FLOPs and transfers of any layout, with no GPU
  doctor [--json]                               what is here, what is missing, and what mends it
  report FILE...                                benchmark results as tables and plots; two runs compared
  audit [--op OP] [--arch ARCH] [--write FILE]  what the GPU kernels cost, known without a GPU

Several machines: torchrun .. -m fused_megatron train CONFIG.toml ..."""

T = TypeVar("T")

# The other ranks may still be importing.
_TOLD_WITHIN_S = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted, 141 nobody reads the output."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        return 141  # as a program that SIGPIPE ends, as most are by `| head -1`
    except OSError as error:
        if error.errno != errno.EIO or not sys.stdout.isatty() or not _output_is_closed():
            raise
        return 129  # as one that SIGHUP ends: the terminal is gone
    return code


def _run(words: Sequence[str]) -> int:
    command = words[0] if words else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(importlib.metadata.version("fused-megatron"))
        return 0
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "train": _train,
        "launch": _launch,
        "generate": _generate,
        "convert": _convert,
        "schedule": _schedule,
        "dry-run": _dry_run,
        "doctor": _doctor,
        "report": _report,
        "audit": _audit,
    }
    try:
        if command not in commands:
            raise SharedInputError(f"unknown command {command!r} (commands: {', '.join(commands)})")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return commands[command](words[1:])
    except InputError as error:
        return _fail(error, 2)
    except RuntimeError as error:
        if not _is_expected(error):
            raise  # a fault of ours: its traceback is worth more than a line
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail(KeyboardInterrupt("interrupted; the same command resumes from the newest checkpoint"), 130)


def _output_is_closed() -> bool:
    """Whether nobody reads what is printed; if so what is left goes nowhere, at the end of the process too."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _train(words: Sequence[str]) -> int:
    from fused_megatron.training.stop_request import StopRequest  # noqa: PLC0415

    stop = StopRequest()  # before the long imports: the launcher may be killed meanwhile
    from fused_megatron.checkpoint import list_checkpoints  # noqa: PLC0415
    from fused_megatron.checkpoint.run_folder import RunFolder  # noqa: PLC0415
    from fused_megatron.config.config_file import load_config, print_help, with_run_folder  # noqa: PLC0415
    from fused_megatron.training.presence import LostRankError, lost_contact  # noqa: PLC0415
    from fused_megatron.training.train import train  # noqa: PLC0415
    from fused_megatron.training.trainer import TrainingError  # noqa: PLC0415

    if any(word in ("-h", "--help") for word in words):
        print_help("fused-megatron train CONFIG.toml", words)
        return 0
    with _told_to_all_ranks():
        if not words or words[0].startswith("-"):
            raise InputError("train needs a config file first (a starting point: examples/gpt_tiny.toml)")
        config = with_run_folder(load_config(Path(words[0]), words[1:]), Path(words[0]))
    run = RunFolder(Path(config.training.run_folder or ""))
    try:
        finished = train(config, run.path, stop)
    except RuntimeError as error:
        if isinstance(error, TrainingError) or not (lost_contact(error) and "RANK" in os.environ):
            raise
        reason = " ".join(str(error).split())[:200]
        found = str(error) if isinstance(error, LostRankError) else f"lost contact with another rank ({reason})"
        # Its files are compared with their checksums when the run resumes: the line comes at once, whatever their size.
        try:
            newest = next((str(path) for path in list_checkpoints(run.checkpoints)), "none")
        except InputError:
            newest = "unknown"
        end_now(f"{found}; newest checkpoint: {newest}; the same command resumes from the newest good one")
    stop.end(ignore=not finished)  # a signal that comes late must not turn a run that saved all into a failed one
    return 0


def _launch(words: Sequence[str]) -> int:
    from fused_megatron.training.launcher import launch  # noqa: PLC0415

    return launch(words)


def _generate(words: Sequence[str]) -> int:
    from fused_megatron.training.generate_text import GenerateArguments, generate_text  # noqa: PLC0415

    arguments = _parsed(GenerateArguments, "generate", words, on_ranks=True)
    if arguments is not None:
        text = generate_text(arguments)
        if speaks_for_host():
            print(text)
    return 0


def _convert(words: Sequence[str]) -> int:
    from fused_megatron.training.convert import ConvertArguments, convert  # noqa: PLC0415

    arguments = _parsed(ConvertArguments, "convert", words, on_ranks=True)
    if arguments is not None:
        convert(arguments)
    return 0


def _schedule(words: Sequence[str]) -> int:
    from fused_megatron.pipeline.command import ScheduleArguments, run_schedule  # noqa: PLC0415

    arguments = _parsed(ScheduleArguments, "schedule", words)
    return 0 if arguments is None else run_schedule(arguments)


def _dry_run(words: Sequence[str]) -> int:
    from fused_megatron.planning.dry_run_command import run_dry_run  # noqa: PLC0415

    return run_dry_run(words)


def _doctor(words: Sequence[str]) -> int:
    from fused_megatron.doctor.command import run_doctor  # noqa: PLC0415

    return run_doctor(words)


def _report(words: Sequence[str]) -> int:
    from fused_megatron.benchmarking.report.command import ReportArguments, run_report  # noqa: PLC0415

    arguments = _parsed(ReportArguments, "report", words)
    return 0 if arguments is None else run_report(arguments)


def _audit(words: Sequence[str]) -> int:
    # Needs a source checkout and its compilers, which those who train do not have: imported when asked for.
    from fused_megatron.audit.command import AuditArguments, run_audit  # noqa: PLC0415

    arguments = _parsed(AuditArguments, "audit", words)
    return 0 if arguments is None else run_audit(arguments)


def _parsed(target: type[T], command: str, words: Sequence[str], on_ranks: bool = False) -> T | None:
    """The options of a command; None where they ask for help, which is printed here.

    on_ranks: a command that several ranks run, with the same words: one of them says what is wrong with these.
    """
    from fused_megatron.config.arguments import parse_arguments, print_arguments  # noqa: PLC0415

    program = f"fused-megatron {command}"
    if any(word in ("-h", "--help") for word in words):
        print_arguments(target, program)
        return None
    with _told_to_all_ranks() if on_ranks else contextlib.nullcontext():
        return parse_arguments(target, words, source=program)


@contextlib.contextmanager
def _told_to_all_ranks() -> Iterator[None]:
    """Around what a rank reads of its words and files: an InputError is raised on every rank that was launched."""
    from fused_megatron.training.scheduler import take_places  # noqa: PLC0415

    take_places()
    try:
        yield
    except InputError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        from fused_megatron.training.launch import launched  # noqa: PLC0415

        with launched(_TOLD_WITHIN_S, error):
            raise AssertionError("launched raises what it was given") from error


def _is_expected(error: RuntimeError) -> bool:
    """Whether the error is for the user: its line says all."""
    from fused_megatron.checkpoint import CheckpointError  # noqa: PLC0415
    from fused_megatron.training.trainer import TrainingError  # noqa: PLC0415

    # What may stand behind a CheckpointError; anything else is a bug.
    causes = InputError | CheckpointError | OSError | RuntimeError | None
    return isinstance(error, (TrainingError, CheckpointError)) and isinstance(error.__cause__, causes)


def _fail(error: BaseException, code: int) -> int:
    if speaks_for_host() or not isinstance(error, SharedError | KeyboardInterrupt):
        say_error(str(error))
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Ours, which are for the user, without the line of source that they came from."""
    with contextlib.suppress(OSError):  # a terminal that is gone
        if category is RuntimeWarning:
            print(f"fused-megatron: warning: {message}", file=sys.stderr, flush=True)
        else:
            print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)
