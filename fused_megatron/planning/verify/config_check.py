"""Verification of a config: comparison of its layout with one process, with a reduced model."""

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from fused_megatron.assembly.build import DTYPES
from fused_megatron.checks import SharedInputError, check, first_line
from fused_megatron.config import TrainConfig
from fused_megatron.planning.verify.comparison import Comparison, Reference, compare
from fused_megatron.planning.verify.layout_parts import describe_layout, parts_of, with_parts
from fused_megatron.planning.verify.layout_run import NUM_UPDATES, run_layout
from fused_megatron.planning.verify.likely_axis import find_cause
from fused_megatron.planning.verify.records import RankRecord
from fused_megatron.planning.verify.reduced_config import MOST_AXES, axes_in_use, reduce_config
from fused_megatron.planning.verify.verification import LayoutResult, Verification
from fused_megatron.testing.run_on_ranks import RankError, run_on_ranks

TIMEOUT_S = 120.0

RunLayout = Callable[[TrainConfig], list[RankRecord]]
"""Function that trains a config on its own ranks and returns the record of each rank."""


def run_layout_on_ranks(config: TrainConfig) -> list[RankRecord]:
    """Call run_layout on new gloo ranks. Raises RankError as run_on_ranks does."""
    return run_on_ranks(run_layout, config.parallel.num_ranks, config, timeout_s=TIMEOUT_S)


def verify_config(
    config: TrainConfig,
    subject: str = "config",
    *,
    all_pairs: bool = False,
    own_dtype: bool = False,
    run: RunLayout = run_layout_on_ranks,
) -> Verification:
    """Train a reduced config in its layout and on one process, and compare every tensor.

    Args:
        config: any config of `fused-megatron train`; its data is not read (tokens are random).
        subject: name of the config in the table.
        all_pairs: run every pair of the axes in use, one after the other. False: one run with at most three axes.
        own_dtype: compute in the precision of the config. False: in float32.
        run: function that runs the ranks of a layout. The one process always runs by run_layout_on_ranks.

    Raises:
        InputError: as reduce_config; attention dropout whose masks depend on the layout.
    """
    check(
        config.model.attention_dropout_kernel == "exact",
        "attention_dropout_kernel='fast' must be 'exact' here: the masks of 'fast' depend on the layout, and no two "
        "layouts have the same numbers (--model.attention-dropout-kernel exact)",
    )
    axes = axes_in_use(config)
    dtype = config.training.weight_dtype if own_dtype else "float32"
    chosen = list(itertools.combinations(axes, 2)) if all_pairs and len(axes) > 1 else [axes[:MOST_AXES]]
    reduced = [reduce_config(config, some, dtype) for some in chosen]
    layouts = tuple(_verify_layout(each, run) for each in reduced)
    return Verification(subject, _setting(config, reduced[0], axes if all_pairs else chosen[0], axes), layouts)


def _setting(config: TrainConfig, reduced: TrainConfig, kept: tuple[str, ...], axes: tuple[str, ...]) -> str:
    model = reduced.model
    left_out = [axis for axis in axes if axis not in kept]
    more = f"; not in this run: {', '.join(left_out)} (--all)" if left_out else ""
    return (
        f"reduced: num_layers {config.model.num_layers} -> {model.num_layers}, hidden_size {config.model.hidden_size} "
        f"-> {model.hidden_size}, seq_len {config.model.seq_len} -> {model.seq_len}; {reduced.training.weight_dtype}, "
        f"random tokens, {NUM_UPDATES} updates{more}"
    )


def _verify_layout(config: TrainConfig, run: RunLayout) -> LayoutResult:
    """Verify the layout of a reduced config."""
    started = time.monotonic()
    reference = _reference(config)

    def differs(parts: tuple[str, ...]) -> bool:
        tried, error = _tried(with_parts(config, parts), reference, run)
        return error is not None or tried is None or tried.first is not None

    comparison, error = _tried(config, reference, run)
    wrong = error is not None or comparison is None or comparison.first is not None
    cause = find_cause(parts_of(config), differs) if wrong and parts_of(config) else None
    return LayoutResult(
        describe_layout(config),
        config.parallel.num_ranks,
        () if comparison is None else comparison.rows,
        None if comparison is None else comparison.first,
        error,
        cause,
        None,
        time.monotonic() - started,
    )


def _reference(config: TrainConfig) -> Reference:
    """Run one process in float32, and for a lower precision also in that precision, whose errors scale the limits."""
    one = with_parts(config, ())
    dtype = DTYPES[config.training.weight_dtype]
    in_float32 = _one_process(_in_dtype(one, "float32"), dtype)
    yardstick = None if dtype == torch.float32 else _one_process(one, dtype)
    return Reference(in_float32, config.optimizer.lr, yardstick)


def _one_process(config: TrainConfig, rounded_to: torch.dtype) -> RankRecord:
    record: RankRecord = run_on_ranks(run_layout, 1, config, rounded_to, timeout_s=TIMEOUT_S)[0]
    return record


def _in_dtype(config: TrainConfig, dtype: str) -> TrainConfig:
    return replace(config, training=replace(config.training, dtype=dtype))


def _tried(config: TrainConfig, reference: Reference, run: RunLayout) -> tuple[Comparison | None, str | None]:
    """Return the comparison, or else the error of a rank as text."""
    try:
        return compare(reference, run(config)), None
    except RankError as error:
        return None, describe_error(error)


def check_starts_own_ranks(caller: str) -> None:
    """Raise on ranks that a launcher started: each would start ranks of its own.

    Raises:
        SharedInputError: on every such rank.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1":
        raise SharedInputError(
            f"{caller} starts its own ranks: run it once, without torchrun, fused-megatron launch, srun or mpirun"
        )


def describe_error(error: RankError) -> str:
    """Return one line with the error and its rank."""
    raised = {rank: each for rank, each in error.errors.items() if each is not None}
    if raised:
        rank, cause = next(iter(raised.items()))
        same = len(raised) > 1 and len({first_line(each) for each in raised.values()}) == 1
        return f"raised on {f'{len(raised)} ranks' if same else f'rank {rank}'}: {first_line(cause)}"
    lines = [line for line in str(error).splitlines()[1:] if line.startswith("rank ")]
    return lines[0] if lines else first_line(error)
