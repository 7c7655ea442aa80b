"""Speed of training steps of the papers' GPTs on the GPUs of a node: weak scaling over tensor-parallel sizes, and more.

    make bench-node                                              all GPUs of this machine
    torchrun --nproc-per-node 8 benchmarks/node.py               the same
    make bench-node ARGS="--presets gpt_8.3b_tp8 --steps 50"
    make bench-node ARGS="--ranks 2 --quick"                     without a GPU: gloo, tiny models of the same form

A preset is a file of benchmarks/presets, which `fused-megatron train` takes, too. The trainer's own parts (model,
schedule, gradients, optimizer) run it on the number of ranks of its layout, on random tokens. A step is all work
between two losses. It is timed from a barrier to the end of the slowest rank's work; the figure is the median of the
steps
[20-80 %] after a warm-up.

    TFLOP/s a rank   model FLOPs / seconds / ranks; observe.model_flops has the formula
    MFU, HFU         model and hardware FLOPs (with recomputation) / seconds / ranks / FLOP/s of a large product on one
                     rank in the same run
    weak scaling     TFLOP/s a rank over the TFLOP/s of the preset of one rank, as in Shoeybi et al. 2019
    breakdown        parts as in observe.step_breakdown; means over the ranks

The needs of a preset are known before it starts: too few ranks or too little memory is one line, and so is a rank that
fails. The results file is written after every preset, and Ctrl-C keeps it; `fused-megatron report` shows it again.
"""

import argparse
import dataclasses
import functools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import torch
from node_ranks import INTERRUPTED, NodeRanks
from node_steps import Measured, measure

from fused_megatron.benchmarking.comparison_table import markdown
from fused_megatron.benchmarking.report.describe_run import describe_run
from fused_megatron.benchmarking.report.results_file import Results, read_results, write_results
from fused_megatron.benchmarking.side_by_side import OURS, Bars, Comparison
from fused_megatron.benchmarking.timing_devices import CpuDevice, CudaDevice, TimingDevice, measure_ceilings
from fused_megatron.checks import InputError
from fused_megatron.config import TrainConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.kept_pages import keep_malloc_pages
from fused_megatron.observe.model_flops import gpt_step_flops
from fused_megatron.observe.processor import processor_name
from fused_megatron.planning.rank_memory import rank_memory

FOLDER = Path(__file__).parent
PRESETS = FOLDER / "presets"
# Part of a GPU's memory for CUDA's context, NCCL's buffers and fragmentation.
RESERVED_SHARE, RESERVED_BYTES = 0.05, 2 << 30
MOST_RANKS_OF_A_NODE = 8


@dataclasses.dataclass(frozen=True)
class Preset:
    """A preset file, or its small form for machines without a GPU."""

    name: str
    config: TrainConfig
    tiny: bool
    published: str

    @property
    def num_ranks(self) -> int:
        parallel = self.config.parallel
        layer_ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        return layer_ranks * (parallel.data_parallel_size or 1)

    @property
    def layout(self) -> str:
        """The layout as tables print it."""
        parallel = self.config.parallel
        words = [f"tp={parallel.tensor_parallel_size}" + " + sp" * parallel.sequence_parallel]
        if parallel.pipeline_parallel_size > 1:
            words.append(f"pp={parallel.pipeline_parallel_size}")
        if (parallel.data_parallel_size or 1) > 1:
            words.append(f"dp={parallel.data_parallel_size}")
        return " ".join(words)


def load_presets(names: Sequence[str], tiny: bool) -> list[Preset]:
    """Load the presets, fewest ranks first; without names, all presets that fit a node.

    Args:
        names: names in benchmarks/presets, or paths of other files.
        tiny: shrink named presets. Other files are taken as they are.

    Raises:
        InputError: no such preset, or the file is not a config.
    """
    paths = {path.stem: path for path in PRESETS.glob("*.toml")}
    presets = []
    for name in names or sorted(paths):
        if name not in paths and not name.endswith(".toml"):
            raise InputError(f"preset={name!r} is no file and none of: {', '.join(sorted(paths))}")
        path = paths.get(name, Path(name))
        config = load_config(path)
        published = [line.partition(":")[2].strip() for line in path.read_text().splitlines() if "# Published:" in line]
        in_little = tiny and name in paths
        preset = Preset(path.stem, shrunk(config) if in_little else config, in_little, " ".join(published))
        # The weak scaling of the papers has no experts.
        if names or (preset.num_ranks <= MOST_RANKS_OF_A_NODE and config.model.num_experts is None):
            presets.append(preset)
    return sorted(presets, key=lambda preset: (preset.num_ranks, gpt_step_flops(preset.config.model, 1)[0]))


def shrunk(config: TrainConfig) -> TrainConfig:
    """Return a small model of the same layout and form: an eighth of the layers, heads of 8, short sequences."""
    model, parallel = config.model, config.parallel
    stages = parallel.pipeline_parallel_size * (parallel.stages_per_rank or 1)
    small = dataclasses.replace(
        model,
        num_layers=max(2, stages, model.num_layers // 8),
        hidden_size=8 * model.num_heads,
        seq_len=64,
        vocab_size=2000,
        pad_vocab_size_to_multiple_of=128,
    )
    return dataclasses.replace(config, model=small)


def refusal(preset: Preset, num_ranks: int, num_bytes: int) -> str | None:
    """Return why a preset cannot run on num_ranks ranks with num_bytes each, or None."""
    if preset.num_ranks > num_ranks:
        return f"needs {preset.num_ranks} ranks ({preset.layout}); {num_ranks} are here"
    need = rank_memory(preset.config).total
    free = int(num_bytes * (1 - RESERVED_SHARE)) - RESERVED_BYTES
    if need > free:
        return (
            f"needs {need / 1e9:.1f} GB on a rank, which has {num_bytes / 1e9:.1f} GB ({free / 1e9:.1f} for training)"
        )
    return None


def comparison_of(preset: Preset) -> Comparison:
    """Return the preset's comparison, without measurements."""
    model, training = preset.config.model, preset.config.training
    tokens = training.global_batch_size * model.seq_len
    model_flops, hardware_flops = gpt_step_flops(model, tokens)
    size = re.match(r"gpt_([\d.]+[bt])_", preset.name)
    name = f"GPT {size[1].upper() if size else preset.name}" + ", tiny" * preset.tiny
    result = Comparison(name, preset.layout, training.dtype, None, Bars())
    result.ranks, result.tokens = preset.num_ranks, tokens
    result.model_flops, result.hardware_flops = model_flops, hardware_flops
    if preset.published and not preset.tiny:
        result.notes["published"] = preset.published
    return result


def fill(result: Comparison, measured: Measured) -> None:
    result.seconds[OURS], result.breakdown[OURS] = measured.seconds, measured.parts
    if measured.peak_bytes is not None:
        result.peak_bytes[OURS] = measured.peak_bytes


def tflops_per_rank(result: Comparison) -> float | None:
    """Return model TFLOP/s of a rank in the median step."""
    ms = result.ms(OURS)
    return None if ms is None else (result.model_flops or 0) / ms.median / 1e9 / result.ranks


def table(results: Results) -> list[str]:
    """Return a line for each preset that has a figure."""
    found = [(c, tflops) for c in results.comparisons if (tflops := tflops_per_rank(c)) is not None]
    base = next((tflops for c, tflops in found if c.ranks == 1), None)
    rows = []
    for c, tflops in found:
        ms, ceiling = c.ms(OURS), results.ceilings.get(f"gemm_gflop_per_s {c.dtype}", 0.0) / 1e3
        assert ms is not None
        hfu = tflops * (c.hardware_flops or 0) / (c.model_flops or 1)
        total = sum(c.breakdown[OURS].values())
        peak = c.peak_bytes.get(OURS)
        rows.append(
            [
                f"{c.op} {c.label}",
                str(c.ranks),
                f"{ms.median:,.1f} [{ms.low:,.1f}-{ms.high:,.1f}]",
                f"{1e3 * (c.tokens or 0) / ms.median:,.0f}",
                f"{tflops:.3g}",
                *(f"{100 * x / ceiling:.0f} %" if ceiling else "-" for x in (tflops, hfu)),
                f"{100 * tflops / base:.0f} %" if base else "-",
                "-" if peak is None else f"{peak / 1e9:.2f}",
                ", ".join(f"{part} {100 * s / total:.0f} %" for part, s in c.breakdown[OURS].items()),
            ]
        )
    header = [
        "GPT",
        "ranks",
        "ms a step",
        "tokens/s",
        "TFLOP/s a rank",
        "MFU",
        "HFU",
        "weak scaling",
        "peak GB a rank",
        "where the time goes",
    ]
    return markdown(header, rows)


def device_bytes(device: TimingDevice, num_ranks: int) -> int:
    """Return the memory of a rank in bytes."""
    if device.is_gpu:
        return torch.cuda.get_device_properties(device.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_ranks


def run(ranks: NodeRanks, device: TimingDevice, presets: Sequence[Preset], options: argparse.Namespace) -> Results:
    """Run every preset, one after the other, on every rank. Rank 0 prints and writes."""
    world = ranks.world_size
    results = describe_run(
        "node",
        device,
        num_gpus=world,
        threads=f"{world} ranks of {torch.get_num_threads()}",
        steps=f"{options.steps} after {options.warm_up}",
    )
    path = options.results or FOLDER / "results" / results.file_name

    def say(text: str) -> None:
        if ranks.rank == 0:
            print(text, flush=True)

    def save() -> None:
        if ranks.rank == 0:
            write_results(results, path)

    def begin(preset: Preset, steps: Callable[[], Measured]) -> Measured:
        say(f"{preset.name}: {preset.layout}, {rank_memory(preset.config).total / 1e9:.2f} GB a rank expected ...")
        return steps()

    def interrupted() -> None:
        say(f"\ninterrupted: {len(results.comparisons)} of {len(presets)} presets are in {os.path.relpath(path)}")

    if ranks.resumed:
        results = read_results(path)
    else:
        say(f"{results.hardware}, {world} rank{'s' * (world > 1)}, torch {torch.__version__}")
        if not device.is_gpu:
            say("no GPU here: gloo, and tiny models of the presets' form; their figures do not predict the real models")
    ranks.interrupted = interrupted
    dtypes = sorted({getattr(torch, p.config.training.dtype) for p in presets}, key=str)
    ceilings, _ = ranks.run("ceilings", world, lambda: measure_ceilings(device, dtypes, quick=options.quick))
    results.ceilings = ceilings or results.ceilings
    save()
    for index, preset in enumerate(presets):
        if index < len(results.comparisons):  # already measured before a fault, or refused
            continue
        result = comparison_of(preset)
        fault = refusal(preset, world, device_bytes(device, preset.num_ranks))
        if fault is None:
            steps = functools.partial(measure, preset.config, device, warm_up=options.warm_up, steps=options.steps)
            measured, fault = ranks.run(preset.name, preset.num_ranks, functools.partial(begin, preset, steps))
            if measured is not None:
                fill(result, measured)
                ms = result.ms(OURS)
                assert ms is not None
                say(f"  {ms.median:,.1f} ms a step [{ms.low:,.1f}-{ms.high:,.1f}], loss {measured.losses[-1]:.3f}")
        if fault:
            result.faults[OURS] = fault
            say(f"{preset.name}: {fault}")
        results.comparisons.append(result)
        save()
    results.complete = True
    save()
    for line in conclusion(results, path):
        say(line)
    return results


def conclusion(results: Results, path: Path) -> list[str]:
    """Return the table and the lines under it."""
    published = [
        f"{c.op} {c.label}: published {c.notes['published']}"
        for c in results.comparisons
        if "published" in c.notes and OURS in c.seconds
    ]
    hint = f"fused-megatron report {os.path.relpath(path)}   shows this again, and plots"
    return ["", *table(results), *published, "", hint]


def start_ranks(count: int | None) -> int:
    """Run this command under torchrun, with a rank for each GPU, or for each of up to 8 cores; return its exit code.

    Only this process gets Ctrl-C and passes it on, so that torchrun prints no traceback of its own.
    """
    cores = os.cpu_count() or 1
    count = count or torch.cuda.device_count() or min(MOST_RANKS_OF_A_NODE, cores)
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [sys.executable, *torchrun, f"--nproc-per-node={count}", *sys.argv]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    stopped = threading.Event()

    def hand_on(errors: IO[bytes]) -> None:
        for line in errors:
            if not stopped.is_set():
                sys.stderr.buffer.write(line)
                sys.stderr.flush()

    assert process.stderr is not None
    reader = threading.Thread(target=hand_on, args=(process.stderr,))
    reader.start()

    def stop(*_: object) -> None:
        stopped.set()
        process.send_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    code = process.wait()
    reader.join()
    return INTERRUPTED if stopped.is_set() else code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--presets",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names in benchmarks/presets, without .toml, or your own FILE.toml",
    )
    parser.add_argument("--steps", type=int, help="timed steps of each preset (20; quick: 2)")
    parser.add_argument("--warm-up", type=int, help="steps before the timed ones (5; quick: 1)")
    parser.add_argument("--quick", action="store_true", help="few steps, to check that everything runs")
    parser.add_argument("--results", type=Path, metavar="FILE", help="benchmarks/results/node_<..>.json when not given")
    parser.add_argument("--ranks", type=int, help="number of ranks to start without torchrun")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="limit of a collective")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (2 if options.quick else 20)
    options.warm_up = options.warm_up or (1 if options.quick else 5)
    return options


def main() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silence the profiler that counts a CPU's memory
    options = parse(sys.argv[1:])
    num_gpus = torch.cuda.device_count()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        presets = load_presets(options.presets, tiny=num_gpus == 0)
    except InputError as error:
        sys.exit(f"error: {error}" if local_rank == 0 else 1)
    if "RANK" not in os.environ:
        sys.exit(start_ranks(options.ranks))
    if 0 < num_gpus <= local_rank:
        sys.exit(f"{os.environ['LOCAL_WORLD_SIZE']} ranks on {num_gpus} GPUs: start at most as many as there are GPUs")
    device: TimingDevice
    if num_gpus > 0:
        torch.cuda.set_device(local_rank)
        device = CudaDevice(local_rank)
    else:
        keep_malloc_pages()
        device = CpuDevice(processor_name() or "cpu")
    results = run(NodeRanks(device.device, options.timeout_s), device, presets, options)
    sys.exit(0 if os.environ["RANK"] != "0" or any(OURS in c.seconds for c in results.comparisons) else 1)


if __name__ == "__main__":
    main()
