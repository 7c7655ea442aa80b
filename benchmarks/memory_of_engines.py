"""Tables and picture of the section "Memory" of docs/planner.md: published memory beside the formulas.

python benchmarks/memory_of_engines.py [--write]

published/tutorial_experiments.csv holds runs of a hands-on tutorial on eight H100 of 80 GB with Megatron-core 0.14. 39
of them state their memory, or that they ran out of it. The unit is MiB / 1000 of device memory, as nvidia-smi shows it.
"""

import argparse
import csv
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fused_megatron.benchmarking.report.page_tables import write_tables
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.engine_memory import DeviceMemory, device_memory
from fused_megatron.planning.megatron_tensors import (
    ATTENTION,
    EXPERTS,
    FIRST,
    LAST,
    MLP,
    block_bytes,
    sizes_of,
)
from fused_megatron.planning.prediction import published_runs
from fused_megatron.planning.prediction.published_runs import KORTHIKANTI, tutorial_config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "planner.md"
PICTURE = ROOT / "docs" / "images" / "memory_of_175b.png"
PUBLISHED = Path(__file__).parent / "published" / "tutorial_experiments.csv"
MEGATRON = "megatron-core"
UNIT = 1e3 * 2**20
"""Bytes of a GB of the published rows."""
NAME = "memory tables"
"""Of the marks in the page."""


@dataclass(frozen=True)
class Row:
    """A published run: its name, its config and its memory in GB; None if it ran out of memory."""

    name: str
    config: TrainConfig
    published: float | None

    def predicted(self) -> float:
        """Return the memory by the table of Megatron-core, in the unit of the published figures."""
        return device_memory(self.config, None, MEGATRON).total / UNIT

    def error(self) -> float:
        """Return the relative error of a run that fitted."""
        assert self.published is not None
        return self.predicted() / self.published - 1


def published_rows() -> list[Row]:
    """Read the published runs whose memory is stated."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return [_row(columns) for columns in csv.DictReader(file) if columns["mem_GB"] or _ran_out(columns)]


def _ran_out(columns: dict[str, str]) -> bool:
    return columns["mem_GB"].upper() == "OOM" or columns["note"] == "OOM row"


def _row(columns: dict[str, str]) -> Row:
    published = None if _ran_out(columns) else float(columns["mem_GB"])
    return Row(columns["id"], _with_dropout(tutorial_config(columns)), published)


def _with_dropout(config: TrainConfig) -> TrainConfig:
    """Return the config with the dropout of the published runs, whose masks take memory."""
    model = replace(config.model, hidden_dropout=0.1, attention_dropout=0.1, embedding_dropout=0.1)
    return replace(config, model=model)


def korthikanti_config(name: str, recompute: str = "selective", sequence_parallel: bool = True) -> TrainConfig:
    """Return a model of table 3 of the paper, which runs attention without a fused kernel."""
    return _with_dropout(published_runs.korthikanti_config(name, recompute, sequence_parallel))


def korthikanti_activations(name: str) -> float:
    """Compute the activations of the first pipeline rank in bytes, by the paper: 34 S B H / R of a block.

    With 1F1B the first rank holds the activations of all layers once; with v stages a rank (1 + (p - 1) / (p v)) times.
    """
    config = korthikanti_config(name)
    pp, stages = config.parallel.pipeline_parallel_size, config.parallel.stages_per_rank or 1
    once = _korthikanti_block(config) * config.model.num_layers
    return once * (1 + (pp - 1) / (pp * stages) if stages > 1 else 1)


def _korthikanti_block(config: TrainConfig) -> float:
    """Compute the bytes of a block by the paper."""
    tokens = config.training.microbatch_size * config.model.seq_len
    return 34 * tokens * config.model.hidden_size / config.parallel.tensor_parallel_size


def tables() -> str:
    """Return the tables of the page."""
    return "\n".join([_tensors(), _korthikanti(), _rows()]).rstrip("\n")


def _tensors() -> str:
    config = korthikanti_config("22B")
    sizes = sizes_of(config)
    lines = ["| where | tensor | bytes | MB of a 22B block | why |", "|---|---|---|--:|---|"]
    for where, table in (
        ("block", ATTENTION),
        ("MLP", MLP),
        ("experts", EXPERTS),
        ("first stage", FIRST),
        ("last stage", LAST),
    ):
        for tensor in table:
            shown = f"{tensor.num_bytes(sizes) / 1e6:.1f}" if where != "experts" and tensor.exists(config, True) else ""
            lines.append(f"| {where} | {tensor.what} | {tensor.formula} | {shown} | {tensor.why} |")
    return "\n".join(lines) + "\n"


def _korthikanti() -> str:
    lines = ["| model | a block, the table | a block, the paper | first rank, the table | first rank, the paper |"]
    lines += ["|---|--:|--:|--:|--:|"]
    for name in KORTHIKANTI:
        config = korthikanti_config(name)
        ours = block_bytes(config, sizes_of(config), has_experts=False, fused=False)
        theirs = _korthikanti_block(config)
        first = device_memory(config, None, "megatron-lm", pp_rank=0).parts["activations"]
        paper = korthikanti_activations(name)
        lines.append(
            f"| {name} | {ours / 1e6:.1f} MB | {theirs / 1e6:.1f} MB | {first / 1e9:.2f} GB | {paper / 1e9:.2f} GB |"
        )
    return "\n".join(lines) + "\n"


def _rows() -> str:
    lines = ["| run | layout | published | predicted | error |", "|---|---|--:|--:|--:|"]
    errors = []
    for row in published_rows():
        parallel, training = row.config.parallel, row.config.training
        axes = {
            "tp": parallel.tensor_parallel_size,
            "dp": parallel.data_parallel_size or 1,
            "ep": parallel.expert_parallel_size,
            "etp": parallel.expert_tensor_parallel_size,
        }
        layout = " ".join(f"{axis}={size}" for axis, size in axes.items() if size > 1)
        layout += f" ZeRO-{parallel.zero_stage} microbatch={training.microbatch_size}"
        error = "" if row.published is None else f"{100 * row.error():+.1f}%"
        errors += [] if row.published is None else [abs(row.error())]
        published = "out of memory" if row.published is None else f"{row.published:.1f}"
        lines.append(f"| {row.name} | {layout.strip()} | {published} | {row.predicted():.1f} | {error} |")
    median, worst = statistics.median(errors), max(errors)
    lines.append(f"| {len(errors)} runs | | | | median {100 * median:.1f}%, max {100 * worst:.1f}% |")
    return "\n".join(lines) + "\n"


def layouts_of_175b() -> dict[str, TrainConfig]:
    """Return three layouts of a GPT of 174.6B parameters over 1,024 GPUs, 2,048 sequences a step."""
    dropout = {"hidden_dropout": 0.1, "embedding_dropout": 0.1}
    model = {"num_layers": 96, "hidden_size": 12288, "num_heads": 96, "seq_len": 2048, "vocab_size": 51200, **dropout}
    training = TrainingConfig(global_batch_size=2048, microbatch_size=1, dtype="bfloat16")
    grid = {
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 16,
        "data_parallel_size": 8,
        "sequence_parallel": True,
    }
    return {
        "Megatron\ntp 8, pp 16, dp 8": TrainConfig(
            GPTConfig(**model), ParallelConfig(**grid, zero_stage=0), training=training
        ),
        "ZeRO-3\ndp 1,024, recompute": TrainConfig(
            GPTConfig(**model, recompute="full"),
            ParallelConfig(data_parallel_size=1024, zero_stage=3),
            training=training,
        ),
        "hybrid\ntp 8, pp 16, dp 8, ZeRO-1": TrainConfig(
            GPTConfig(**model), ParallelConfig(**grid, zero_stage=1), training=training
        ),
    }


def papers_of_175b() -> dict[str, float]:
    """Return the bytes that the papers' formulas give for the same layouts, without overheads.

    Megatron: 18 bytes a parameter of the first stage, and 34 S B H / R for each block of all stages. ZeRO-3
    (Rajbhandari et al. 2020): 16 bytes a parameter over all ranks, and the inputs of all blocks. The hybrid's
    parameters take 6 + 12 / dp bytes.
    """
    token = 2048 * 12288
    first = (96 / 16 * 12 * 12288**2 + 51200 * 12288) / 8
    activations = 34 * token * 96 / 8
    names = list(layouts_of_175b())
    return {
        names[0]: 18 * first + activations,
        names[1]: 16 * 174.6e9 / 1024 + 2 * token * 96,
        names[2]: (6 + 12 / 8) * first + activations,
    }


def draw(path: Path) -> None:
    """Draw the memory of the fullest GPU by kind: as Megatron keeps it, as ours does, and the papers' formulas."""
    colours = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#bbbbbb")
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    papers = papers_of_175b()
    for group, (name, config) in enumerate(layouts_of_175b().items()):
        for at, engine in ((group - 0.19, MEGATRON), (group + 0.19, "fused-megatron")):
            bottom = 0.0
            for colour, (part, num_bytes) in zip(colours, _by_part(device_memory(config, None, engine)), strict=True):
                label = part if group == 0 and engine == MEGATRON else None
                axis.bar(at, num_bytes / 1e9, 0.34, bottom, color=colour, label=label)
                bottom += num_bytes / 1e9
            axis.text(at, bottom + 0.5, f"{bottom:.1f}", ha="center", fontsize=8)
            axis.text(at, 0.6, "Megatron" if engine == MEGATRON else "ours", ha="center", fontsize=7, color="white")
        axis.plot([group - 0.4, group + 0.4], [papers[name] / 1e9] * 2, "k--", linewidth=1)
        axis.text(group + 0.41, papers[name] / 1e9, f"{papers[name] / 1e9:.1f}", fontsize=8, va="center")
    axis.set_xticks(range(len(papers)), list(papers))
    axis.set_ylabel("GB (10^9 bytes) of the fullest GPU")
    axis.plot([], [], "k--", linewidth=1, label="formulas of the papers")
    axis.legend(frameon=False, fontsize=8)
    axis.set_title("Memory of a GPT of 175B parameters over 1,024 GPUs, microbatch of 1 x 2,048 tokens", fontsize=10)
    figure.savefig(path, dpi=120)


def _by_part(memory: DeviceMemory) -> list[tuple[str, int]]:
    return [*memory.parts.items(), ("context, NCCL, allocator", memory.overhead)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables and the picture of the page")
    if not parser.parse_args().write:
        print(tables())
        return
    draw(PICTURE)
    write_tables(PAGE, {NAME: tables()})


if __name__ == "__main__":
    main()
