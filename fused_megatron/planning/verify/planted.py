"""Verification of a layout with a known fault planted into its ranks: an exercise in reading the report."""

from functools import partial

from fused_megatron.checks import InputError, check_one_of
from fused_megatron.config import TrainConfig
from fused_megatron.planning.command_line import text_table
from fused_megatron.planning.verify.config_check import TIMEOUT_S, verify_config
from fused_megatron.planning.verify.layout_run import run_layout
from fused_megatron.planning.verify.module_run import ModuleRun, run_module
from fused_megatron.planning.verify.records import RankRecord
from fused_megatron.planning.verify.user_model import verify
from fused_megatron.planning.verify.verification import Verification
from fused_megatron.testing.planted_faults import FAULTS, Fault, fault
from fused_megatron.testing.run_on_ranks import run_on_ranks


def find_fault(name: str) -> Fault:
    """Return the fault with this name, such as norm_gradient_not_summed; InputError names the nearest."""
    names = [word_of(each) for each in FAULTS]
    check_one_of("plant", name.replace("-", "_"), names, "fused-megatron verify --plant list")
    return FAULTS[names.index(name.replace("-", "_"))]


def word_of(planted: Fault) -> str:
    """Return the name of a fault as a word of the command line."""
    return planted.name.replace(" ", "_")


def list_of_faults() -> str:
    """Return a line for each fault: its name, the part of the layout that has it, and what is wrong."""
    rows = [(word_of(each), each.axis, (each.plant.__doc__ or "").splitlines()[0]) for each in FAULTS]
    return "\n".join(text_table([("fault", "part of the layout", "what is wrong"), *rows], left=(0, 1, 2)))


def verify_planted(planted: Fault, config: TrainConfig | None = None, subject: str = "its own run") -> Verification:
    """Compare a layout with the fault with one process without it.

    Args:
        planted: the fault.
        config: a config of a run. None: the run, or the module, that shows the fault best.
        subject: name of the config in the table.

    Raises:
        InputError: a config for a fault that only a module shows; as verify_config.
    """
    config = config or planted.config
    if config is None:
        assert planted.build_model is not None
        return verify(planted.build_model, {"tp": 2}, planted.batch, run=partial(_module_with_fault, planted.name))
    if planted.config is None:
        raise InputError(f"plant={word_of(planted)} is a fault of a module: leave the config out")
    return verify_config(config, subject, run=partial(_layout_with_fault, planted.name))


def conclusion(planted: Fault, result: Verification) -> tuple[str, bool]:
    """Return the sentence below the table, and whether the report names the fault: its axis and its tensor."""
    first, cause = result.first_difference, result.layouts[0].cause
    what = f"planted: {word_of(planted)} ({(planted.plant.__doc__ or '').splitlines()[0].rstrip('.')})"
    if result.layouts[0].error is not None:
        return f"{what}\nFOUND, by an error of a rank: {result.layouts[0].error}", False
    if first is None:
        return f"{what}\nNOT FOUND: this layout does not show it (without a config its own run does)", False
    axes = () if cause is None else cause.parts
    if axes == (planted.axis,):
        return f"{what}\nNAMED: the first tensor that differs, and its axis, {planted.axis}", True
    return f"{what}\nFOUND, but the report names {', '.join(axes) or 'no axis'} in place of {planted.axis}", False


def _layout_with_fault(name: str, config: TrainConfig) -> list[RankRecord]:
    return run_on_ranks(_planted_layout, config.parallel.num_ranks, name, config, timeout_s=TIMEOUT_S)


def _module_with_fault(name: str, run: ModuleRun) -> list[RankRecord]:
    return run_on_ranks(_planted_module, run.num_ranks, name, run, timeout_s=TIMEOUT_S)


def _planted_layout(rank: int, world_size: int, name: str, config: TrainConfig) -> RankRecord:
    with fault(name).plant():
        return run_layout(rank, world_size, config)


def _planted_module(rank: int, world_size: int, name: str, run: ModuleRun) -> RankRecord:
    with fault(name).plant():
        return run_module(rank, world_size, run)
