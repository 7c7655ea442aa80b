"""Blocks of a cluster whose time follows from measured steps: what 15 constants cannot know of single shapes."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from zlib import crc32

from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import check
from fused_megatron.config.config_file import load_config
from fused_megatron.planning.command_line import on_ranks, with_vocabulary
from fused_megatron.planning.prediction.beside_measured import MEASURED
from fused_megatron.planning.prediction.cluster import BlockShape, Cluster, MeasuredBlock, block_shape
from fused_megatron.planning.prediction.engine import OWN
from fused_megatron.planning.prediction.published_runs import PublishedRun, read_runs
from fused_megatron.planning.prediction.step_time import predict_step

_MOST = 4.0
"""Measured over predicted time of a step from which a row is no step of this cluster, and its inverse."""
_HALVED = 18
"""Times that the range of a factor is halved: to 1e-5."""


def read_steps(path: Path, num_ranks: int | None = None) -> list[PublishedRun]:
    """Read measured steps: the rows of a CSV file, or the median step of the folder of a run.

    The first step of a run warms up and is left out.

    Args:
        path: a file as of read_runs, or a run folder.
        num_ranks: ranks of the run of a folder; None: its config has a data-parallel size, or the run had one replica.

    Raises:
        InputError: the file or the folder cannot be read, or has no measured steps; ranks that do not fit.
    """
    check(path.exists(), f"steps={path} does not exist")
    if not path.is_dir():
        check(num_ranks is None, f"ranks={num_ranks} does not go with steps={path}: its rows have their ranks")
        return read_runs(path, "steps")
    folder = RunFolder(path)
    check(folder.config.is_file(), f"steps={path} must be a CSV file or the folder of a run, with a config.toml")
    config = with_vocabulary(load_config(folder.config))
    if num_ranks is not None or config.parallel.data_parallel_size is None:
        one = dataclasses.replace(config.parallel, data_parallel_size=1).num_ranks
        config = on_ranks(config, one if num_ranks is None else num_ranks)
    times = [record[MEASURED] for record in folder.read_metrics() if MEASURED in record][1:]
    check(bool(times), f"steps={path} must be of a run with two steps or more in its {folder.metrics.name}")
    digest = f"{crc32(folder.metrics.read_bytes()):08x}"
    return [PublishedRun(str(path), config, OWN, statistics.median(times), digest)]


def with_measured_blocks(cluster: Cluster, runs: Sequence[PublishedRun], engine: str | None = None) -> Cluster:
    """Return the cluster with the factors of all block shapes of measured steps.

    The factor of a shape is the median over its steps of the factor with which the predicted step is the measured one.
    So it also takes up errors of other parts of these steps. A factor that the cluster has of such a shape is replaced;
    its other shapes and its constants stay.

    Args:
        cluster: the machine that ran the steps.
        runs: measured steps.
        engine: key of ENGINES: the program that ran them; None: the one of the source.

    Raises:
        InputError: a run that no config describes, or whose time is beyond 4 times its prediction or below a quarter.
    """
    factors: dict[BlockShape, list[tuple[float, str]]] = defaultdict(list)
    known = {block.shape: block for block in cluster.blocks}
    for run in runs:
        factors[block_shape(run.config)].append((_factor(run, cluster, engine or run.engine), run.digest))
    for shape, of_shape in factors.items():
        factor = round(statistics.median(factor for factor, _ in of_shape), 4)
        known[shape] = MeasuredBlock(*shape, factor, tuple(sorted(digest for _, digest in of_shape)))
    return dataclasses.replace(cluster, blocks=tuple(known[shape] for shape in sorted(known)))


def learned_lines(cluster: Cluster, runs: Sequence[PublishedRun], engine: str | None = None) -> Iterator[str]:
    """Return the factors of the shapes of measured steps, and the errors of these steps with them, as lines."""
    shapes = {block_shape(run.config) for run in runs}
    without = dataclasses.replace(cluster, blocks=())
    yield f"{'hidden':>8}  {'heads':>5}  {'sequence':>8}  {'tp':>3}  {'tokens':>8}  {'steps':>5}  {'factor':>6}"
    for block in cluster.blocks:
        if block.shape in shapes:
            yield (
                f"{block.hidden_size:>8,}  {block.num_heads:>5}  {block.seq_len:>8,}  {block.tensor_parallel_size:>3}  "
                f"{block.microbatch_tokens:>8,}  {len(block.rows):>5}  {block.factor:>6.3f}"
            )
    errors = [
        statistics.fmean(
            abs(predict_step(run.config, one, engine=engine or run.engine).seconds / run.seconds - 1) for run in runs
        )
        for one in (without, cluster)
    ]
    yield f"mean error of these steps: {errors[0]:.1%} by the constants, {errors[1]:.1%} with the factors"


def _factor(run: PublishedRun, cluster: Cluster, engine: str) -> float:
    """Return the factor of the blocks with which the predicted step is the measured one."""
    shape = block_shape(run.config)

    def predicted_s(factor: float) -> float:
        blocks = (MeasuredBlock(*shape, factor, ()),)
        return predict_step(run.config, dataclasses.replace(cluster, blocks=blocks), engine=engine).seconds

    found = predicted_s(1.0)
    check(
        1 / _MOST <= run.seconds / found <= _MOST,
        f"{run.name}: measured {run.seconds:.4g} s, predicted {found:.4g} s: not a step of {cluster.name} under "
        f"{engine} (a step that is used takes a quarter to {_MOST:g} times its prediction)",
    )
    # A step grows with the time of its blocks, but not evenly: with another factor another stage may be the busiest.
    low, high = 1 / _MOST, _MOST
    for _ in range(_HALVED):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted_s(middle) < run.seconds else (low, middle)
    return (low + high) / 2
