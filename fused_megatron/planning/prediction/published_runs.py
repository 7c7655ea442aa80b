"""Published and measured training steps: rows of CSV files as configs of this package."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

from fused_megatron.checks import InputError, check
from fused_megatron.config import GPTConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.observe.model_flops import gpt_step_flops
from fused_megatron.untrusted_files import read_bounded

_MOST_BYTES = 16 << 20


@dataclass(frozen=True)
class PublishedRun:
    """A measured training step.

    Attributes:
        name: of the row, for tables.
        config: the run in the words of this package.
        engine: key of ENGINES: the program that ran it.
        seconds: measured time of a step.
        digest: of the row, by which a cluster file names the rows to which it was fitted.
    """

    name: str
    config: TrainConfig
    engine: str
    seconds: float
    digest: str = ""


Row = Mapping[str, str]
_Reader = Callable[[Row], PublishedRun | list[PublishedRun] | None]


def read_runs(path: Path, option: str = "validate") -> list[PublishedRun]:
    """Read the rows of a CSV file that have a time; its columns decide which source it is of.

    Args:
        path: the file.
        option: the option that names the file, for messages.

    Raises:
        InputError: the file cannot be read, its columns are of no known source, or a cell is no number.
    """
    file = f"{option}={path}"
    try:
        text = read_bounded(path, _MOST_BYTES).decode()
    except FileNotFoundError:
        raise InputError(f"{file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise InputError(f"{file} must be a CSV file: {error}") from None
    columns = rows[0].keys() if rows else ()
    for needed, read in _SOURCES:
        if set(needed) <= set(columns):
            return _runs(file, rows, read)
    wanted = " or ".join(",".join(needed) for needed, _ in _SOURCES)
    raise InputError(f"{file} must be a CSV file with rows and the columns {wanted}")


class _Cells(dict[str, str]):
    """A row that knows which of its cells was read last, for messages."""

    last = ""

    def __getitem__(self, name: str) -> str:
        self.last = name
        return super().__getitem__(name)


def _runs(file: str, rows: Sequence[Row], read: _Reader) -> list[PublishedRun]:
    found = []
    for index, row in enumerate(rows):
        cells, where = _Cells(row), f"{file}: row {index + 2}"
        check(None not in row, f"{where} must have a cell for each column, and has more: check its commas and quotes")
        try:
            run = read(cells)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        except (ValueError, TypeError, KeyError, ZeroDivisionError, OverflowError):
            cell = f"{cells.last}={row.get(cells.last)!r:.40}"
            raise InputError(f"{where}: {cell} must be a number, or a name that this source has") from None
        for one in run if isinstance(run, list) else [run]:
            if one is not None:
                check(0 < one.seconds < math.inf, f"{where}: the time of the step must be above 0, and finite")
                found.append(replace(one, digest=f"{crc32(','.join(row.values()).encode()):08x}"))
    check(bool(found), f"{file} has no row with a time that can be predicted")
    return found


def _gpt(**model: object) -> GPTConfig:
    return GPTConfig(**{"vocab_size": 50304, "recompute": "none", **model})  # type: ignore[arg-type]


def _read_grid(row: Row) -> PublishedRun:
    """Read a row of a grid of layouts: GPTs under Megatron-DeepSpeed, fp16, every layer recomputed."""
    tp, pp, dp = (int(row[f"{axis}_parallel_size"]) for axis in ("tensor", "pipeline", "data"))
    gpus = int(row["gpus"])
    check(gpus == tp * pp * dp > 0, f"gpus={gpus} must be tp x pp x dp = {tp} x {pp} x {dp}, all above 0")
    model = _gpt(
        num_layers=int(row["num_layers"]),
        hidden_size=int(row["hidden_size"]),
        num_heads=int(row["num_heads"]),
        seq_len=int(row["seq_len"]),
        # The program does not pad its vocabulary: a rank has the whole part of 50257 / tp columns.
        vocab_size=50257 // tp * tp,
        pad_vocab_size_to_multiple_of=1,
        recompute="full",
    )
    config = _config(model, int(row["global_batch_size"]), int(row["microbatch_size"]), tp=tp, pp=pp, dp=dp)
    size = f"h{model.hidden_size} L{model.num_layers}"
    name = f"{size} tp{tp} pp{pp} dp{dp} b{config.training.microbatch_size}/{config.training.global_batch_size}"
    return PublishedRun(name, config, "megatron-deepspeed", float(row["step_ms"]) / 1e3)


_MPT = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 12),
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "70b": (80, 8192, 64),
}
"""Layers, hidden size and heads of the MPT models."""
_SHARDING = {"FULL_SHARD": 3, "SHARD_GRAD_OP": 2, "NO_SHARD": 0}


def _read_foundry(row: Row) -> PublishedRun | None:
    """Read a row of LLM Foundry's tables: MPT models under FSDP."""
    if row["Activation CPUOffload"] == "True" or row["Precision"] not in ("bf16", "amp_bf16"):
        return None
    layers, hidden, heads = _MPT[row["Model"]]
    model = _gpt(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        seq_len=int(row["SeqLen (T)"]),
        vocab_size=50368,
        linear_biases=False,
        recompute="full" if row["Activation Checkpointing"] == "True" else "none",
    )
    gpus, micro, accumulated = int(row["# GPUs"]), int(row["MicroBatchSize"]), int(row["GradAccum"])
    batch = micro * gpus * accumulated
    config = _config(model, batch, micro, dp=gpus, zero_stage=_SHARDING[row["Sharding Strategy"]])
    recomputed = " recomputed" * (model.recompute == "full")
    name = f"{row['Model']}{recomputed} {row['GPU']} S{model.seq_len} gpus{gpus} b{micro}x{accumulated}"
    return PublishedRun(name, config, "llm-foundry", batch * model.seq_len / float(row["Throughput (T/s)"]))


KORTHIKANTI = {
    # heads, hidden, layers, pp, stages a rank, batch, microbatch
    "22B": (64, 6144, 48, 1, 1, 4, 4),
    "175B": (96, 12288, 96, 8, 3, 64, 1),
    "530B": (128, 20480, 105, 35, 3, 280, 1),
    "1T": (160, 25600, 128, 64, 1, 512, 1),
}
"""Table 3 of Korthikanti et al. 2022 (arXiv:2205.05198); the tensor-parallel size is 8."""


def korthikanti_config(name: str, recompute: str, sequence_parallel: bool) -> TrainConfig:
    """Return a model of table 3 of the paper."""
    heads, hidden, layers, pp, stages, batch, micro = KORTHIKANTI[name]
    model = _gpt(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        seq_len=2048,
        vocab_size=51200,
        recompute=recompute,
    )
    return _config(model, batch, micro, tp=8, pp=pp, dp=1, stages=stages, sequence_parallel=sequence_parallel)


def _read_korthikanti(row: Row) -> list[PublishedRun]:
    """Return the two runs of a row of table 5: everything recomputed, and sequence parallelism with selective."""
    runs = []
    for column, recompute, sequence in (("full_recompute_s", "full", False), ("present_work_s", "selective", True)):
        config = korthikanti_config(row["model"].split()[0], recompute, sequence)
        runs.append(PublishedRun(f"{row['model']} {recompute}", config, "megatron-lm", float(row[column])))
    return runs


def _read_ptdp(row: Row) -> PublishedRun:
    """Read a row of table 1 of Narayanan et al. 2021 (arXiv:2104.04473)."""
    tp, pp, gpus, batch = (int(row[name]) for name in ("TP", "PP", "gpus", "batch"))
    model = _gpt(
        num_layers=int(row["layers"]),
        hidden_size=int(row["hidden"]),
        num_heads=int(row["heads"]),
        seq_len=2048,
        vocab_size=51200,
        recompute="full",
    )
    dp = gpus // (tp * pp)
    # The paper does not give the microbatch; it says that one sequence was best for the models with pipelines.
    micro = 1 if pp > 1 else min(4, batch // dp)
    stages = 1 if pp == 1 else max(s for s in (1, 2, 3) if model.num_layers % (pp * s) == 0)
    stages = stages if batch // dp // micro % pp == 0 else 1
    config = _config(model, batch, micro, tp=tp, pp=pp, dp=dp, stages=stages)
    seconds = _step_s(config, float(row["TFLOPs_per_gpu"]))
    return PublishedRun(f"{row['params_B']}B tp{tp} pp{pp} dp{dp}", config, "megatron-lm", seconds)


def _step_s(config: TrainConfig, tflops_per_gpu: float) -> float:
    """Return the seconds of a step at a published rate, which counts recomputation."""
    _, flops = gpt_step_flops(config.model, config.training.global_batch_size * config.model.seq_len)
    return flops / (1e12 * tflops_per_gpu * config.parallel.num_ranks)


def _read_scaling(row: Row) -> PublishedRun:
    """Read a row of table 2 of the same paper: PTD-P, or ZeRO stage 3 without model parallelism."""
    is_175b = row["params_B"].startswith("174")
    layers, hidden, heads, pp = (96, 12288, 96, 12) if is_175b else (105, 20480, 128, 35)
    model = _gpt(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        seq_len=2048,
        vocab_size=51200,
        recompute="full",
    )
    gpus, batch, micro = int(row["gpus"]), int(row["batch"].strip("*")), int(row["microbatch"])
    shards = row["scheme"].startswith("ZeRO")
    sizes: dict[str, Any] = {"dp": gpus, "zero_stage": 3} if shards else {"tp": 8, "pp": pp, "dp": gpus // (8 * pp)}
    config = _config(model, batch, micro, **sizes)
    seconds = _step_s(config, float(row["TFLOPs_per_gpu"]))
    engine = "megatron-deepspeed" if shards else "megatron-lm"
    return PublishedRun(f"{row['params_B']}B {row['scheme']} gpus{gpus} b{micro}", config, engine, seconds)


def _read_tutorial(row: Row) -> PublishedRun | None:
    """Read a run of a hands-on tutorial on 8 H100 under Megatron-LM core 0.14; None for a run without a time."""
    if not row["step_ms"] or row["use"] == "SUSPECT":
        return None
    return PublishedRun(row["id"], tutorial_config(row), "megatron-core", float(row["step_ms"]) / 1e3)


def tutorial_config(row: Row) -> TrainConfig:
    """Return the config of a run of the tutorial, without its dropout."""
    tp, pp, cp, ep, etp, chunks = (int(row[name] or 1) for name in ("tp", "pp", "cp", "ep", "etp", "vpp_chunks"))
    experts: dict[str, object] = {}
    if row["experts"]:
        experts = {
            "num_experts": int(row["experts"]),
            "experts_per_token": int(row["topk"]),
            "expert_ffn_hidden_size": int(row["ffn"]),
            "linear_biases": False,
        }
    model = _gpt(
        num_layers=int(row["layers"]),
        hidden_size=int(row["hidden"]),
        num_heads=int(row["heads"]),
        ffn_hidden_size=int(row["ffn"]),
        seq_len=int(row["seq"]),
        vocab_size=int(row["vocab_padded"]),
        recompute="full" if row["recompute"].startswith("full") else "none",
        **experts,
    )
    return _config(
        model,
        int(row["gbs"]),
        int(row["mbs"]),
        tp=tp,
        pp=pp,
        dp=int(row["dp"]),
        cp=cp,
        ep=ep,
        etp=etp,
        stages=chunks,
        zero_stage=int(row["dist_opt"]),
        sequence_parallel=row["sp"] == "1",
    )


def _config(
    model: GPTConfig,
    batch: int,
    micro: int,
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    cp: int = 1,
    ep: int = 1,
    etp: int = 1,
    stages: int = 1,
    zero_stage: int = 0,
    sequence_parallel: bool = False,
) -> TrainConfig:
    parallel = ParallelConfig(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        stages_per_rank=stages if stages > 1 else None,
        data_parallel_size=dp,
        context_parallel_size=cp,
        expert_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        zero_stage=zero_stage,
        sequence_parallel=sequence_parallel,
    )
    return TrainConfig(
        model=model,
        parallel=parallel,
        training=TrainingConfig(dtype="bfloat16", global_batch_size=batch, microbatch_size=micro),
    )


_SOURCES: tuple[tuple[tuple[str, ...], _Reader], ...] = (
    (("step_ms", "gpus", "hidden_size", "tensor_parallel_size", "pipeline_parallel_size"), _read_grid),
    (("Model", "SeqLen (T)", "Sharding Strategy", "Throughput (T/s)"), _read_foundry),
    (("TFLOPs_per_gpu", "params_B", "TP", "PP"), _read_ptdp),
    (("TFLOPs_per_gpu", "params_B", "scheme", "microbatch"), _read_scaling),
    (("full_recompute_s", "present_work_s", "model"), _read_korthikanti),
    (("step_ms", "dist_opt", "mbs", "vpp_chunks", "recompute"), _read_tutorial),
)
"""The columns that tell a source, and the reader of its rows."""
