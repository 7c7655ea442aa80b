"""Start here when a step is not the step of plain torch, a figure is wrong, or ranks drift apart and train on."""

import contextlib
import dataclasses
import json
import math
import re
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fused_megatron.assembly import assemble as assemble_module
from fused_megatron.checkpoint import CheckpointError
from fused_megatron.checkpoint import save as save_module
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import InputError
from fused_megatron.config import DataConfig, GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.config.optimizer import KINDS
from fused_megatron.data.batch import Batch
from fused_megatron.data.indexed_dataset import IndexedDatasetWriter
from fused_megatron.data.read_ahead import THREAD_NAME
from fused_megatron.data.training_data import TrainingData, open_training_data
from fused_megatron.data_parallel.optimizer import Optimizer
from fused_megatron.models import GPT
from fused_megatron.observe.model_flops import gpt_step_flops
from fused_megatron.reference.sample_index import permutation
from fused_megatron.testing.run_on_ranks import RankError, run_on_ranks
from fused_megatron.training import trainer as trainer_module
from fused_megatron.training.train import train
from fused_megatron.training.trainer import NonFiniteError, Trainer

# Each run draws its loss plot: imported once here, matplotlib is shared by all forked ranks.
with contextlib.suppress(ImportError):
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

VOCAB, SEQ_LEN, SEED = 61, 12, 7
DOCUMENTS = [np.random.default_rng(i).integers(0, VOCAB, 30 + 7 * (i % 5)) for i in range(20)]
DOCUMENTS[0][:] = np.arange(len(DOCUMENTS[0])) + VOCAB - len(DOCUMENTS[0])  # the largest id occurs
HELD_OUT = (9, 19)  # a tenth, evenly spread


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the documents as an indexed dataset: no text, no tokenizer to train."""
    prefix = tmp_path_factory.mktemp("tokens") / "documents"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    return prefix


def config_for(tokens: Path, run: Path, **changes: Any) -> TrainConfig:
    """Return the config of a run of a second, with few default values; `changes` are fields of any section."""
    sections: dict[str, Any] = {
        "model": GPTConfig(num_layers=2, hidden_size=16, num_heads=2, seq_len=SEQ_LEN, pad_vocab_size_to_multiple_of=8),
        "parallel": ParallelConfig(timeout_s=60),
        "data": DataConfig(path=str(tokens), cache_folder=str(tokens.parent / "cache"), validation_fraction=0.1),
        "optimizer": OptimizerConfig(
            lr=3e-2, min_lr=1e-3, warmup_steps=2, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3, clip_norm=0.4
        ),
        "training": TrainingConfig(
            num_steps=5,
            global_batch_size=4,
            microbatch_size=2,
            seed=SEED,
            eval_interval=5,
            eval_batches=50,
            checkpoint_interval=5,
            run_folder=str(run),
        ),
    }
    for name, section in sections.items():
        fields = {f.name for f in dataclasses.fields(section)}
        sections[name] = dataclasses.replace(section, **{k: v for k, v in changes.items() if k in fields})
    return TrainConfig(**sections)


def samples_in_order(count: int) -> torch.Tensor:
    """Return [count, SEQ_LEN + 1]: epochs of shuffled documents, cut into samples that overlap by a token, shuffled."""
    documents = [d for i, d in enumerate(DOCUMENTS) if i not in HELD_OUT]
    rows: list[np.ndarray] = []
    epoch = 0
    while len(rows) < count:
        text = np.concatenate([documents[i] for i in permutation(len(documents), SEED, epoch, 0)])
        samples = [text[i : i + SEQ_LEN + 1] for i in range(0, len(text) - SEQ_LEN, SEQ_LEN)]
        rows += [samples[i] for i in permutation(len(samples), SEED, epoch, 1)]
        epoch += 1
    return torch.from_numpy(np.stack(rows[:count]).astype(np.int64))


def mean_loss(model: GPT, rows: torch.Tensor) -> torch.Tensor:
    logits = model(rows[:, :-1])[..., :VOCAB]
    return F.cross_entropy(logits.reshape(-1, VOCAB), rows[:, 1:].reshape(-1))


def plain_loop(num_steps: int) -> tuple[list[dict[str, float]], float, GPT]:
    """Train with torch's AdamW and without our code; return the steps' records, the held-out loss and the model."""
    config = dataclasses.replace(config_for(Path(), Path()).model, vocab_size=VOCAB)
    model = GPT(config, seed=SEED)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.9), eps=1e-3)
    samples, records = samples_in_order(4 * num_steps), []
    rates = [1.5e-2, 3e-2, 3e-2, 1e-3 + 0.5 * 2.9e-2, 1e-3]  # two steps of warm-up, then half a cosine
    for step, rate in enumerate(rates[:num_steps]):
        adamw.zero_grad()
        loss = mean_loss(model, samples[4 * step : 4 * step + 4])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.4)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        records.append({"loss": loss.item(), "gradient_norm": norm.item(), "lr": rate})
    held_out = torch.from_numpy(np.concatenate([DOCUMENTS[i] for i in HELD_OUT]).astype(np.int64))
    with torch.no_grad():
        losses = [
            mean_loss(model, held_out[None, i : i + SEQ_LEN + 1]) * len(held_out[i + 1 : i + SEQ_LEN + 1])
            for i in range(0, len(held_out) - 1, SEQ_LEN)
        ]
    return records, (sum(losses) / (len(held_out) - 1)).item(), model


def trained_weights(rank: int, world_size: int, config: TrainConfig) -> dict[str, torch.Tensor]:
    """Train; return this rank's weights after the last step."""
    trainers, original = [], Trainer.run

    def run(self: Trainer) -> bool:
        trainers.append(self)
        return original(self)

    Trainer.run = run  # type: ignore[method-assign]
    train(config, Path(str(config.training.run_folder)))
    return {name: p.detach().clone() for name, p in trainers[0].parameters.items()}


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, None), (2, 0), (2, None)], ids=["1", "2-stage0", "2"])
def test_five_steps_are_those_of_a_plain_loop(tokens: Path, tmp_path: Path, ranks: int, zero_stage: int | None) -> None:
    """Loss, norm, learning rate, weights, choice of samples and held-out loss, for any number of replicas."""
    expected, held_out_loss, model = plain_loop(5)
    assert all(record["gradient_norm"] > 0.4 for record in expected), "clipping must clip"
    weights = run_on_ranks(trained_weights, ranks, config_for(tokens, tmp_path, zero_stage=zero_stage), timeout_s=100)
    records = RunFolder(tmp_path).read_metrics()
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    for ours, theirs in zip(steps, expected, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=2e-5), (ours, theirs)
    for of_rank in weights:
        assert of_rank.keys() == dict(model.named_parameters()).keys()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(of_rank[name], weight.detach(), rtol=1e-4, atol=2e-5)
    (evaluation,) = [record for record in records if "validation_loss" in record]
    assert evaluation["validation_loss"] == pytest.approx(held_out_loss, rel=2e-5)
    assert evaluation["validation_tokens"] == sum(len(DOCUMENTS[i]) for i in HELD_OUT) - 1
    assert evaluation["bits_per_byte"] is None


def with_a_fault(rank: int, world_size: int, config: TrainConfig, fault: str) -> None:
    """Train; the last rank has a fault of its own in step 3."""
    step, squares = Trainer.train_step, assemble_module.sum_of_counted_squares
    steps = [0]

    def train_step(self: Trainer) -> bool:
        steps[0] += 1
        stop = step(self)
        if fault == "weight" and steps[0] == 3 and rank == world_size - 1:
            self.parameters["blocks.1.mlp.projection.weight"].data[0, 0] += 0.5
        return stop

    def sum_of_counted_squares(parameters: Any, gradients: Any, *rank_and_rows: Any) -> torch.Tensor:
        if fault == "gradient" and steps[0] == 3 and rank == world_size - 1:  # the sums over ranks are done
            gradients["blocks.1.mlp.projection.weight"][-1, -1] = math.nan
        return squares(parameters, gradients, *rank_and_rows)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    assemble_module.sum_of_counted_squares = sum_of_counted_squares
    train(config, Path(str(config.training.run_folder)))


def errors_of(fault: str, config: TrainConfig) -> list[str]:
    with pytest.raises(RankError) as caught:
        run_on_ranks(with_a_fault, 2, config, fault, timeout_s=100)
    return [f"{type(e).__name__}: {e}" for e in (caught.value.errors[rank] for rank in (0, 1))]


def test_replicas_that_drift_apart_end_the_run(tokens: Path, tmp_path: Path) -> None:
    """The check comes before the checkpoint of the same step."""
    # With a stage of ZeRO a replica updates some rows, and the next gather mends the others.
    changes = {"replica_check_interval": 2, "checkpoint_interval": 2, "zero_stage": 0}
    texts = errors_of("weight", config_for(tokens, tmp_path, **changes))
    wanted = "DriftError: step 4: ranks drifted apart: blocks.1.mlp.projection.weight on rank 1 differs from rank 0 ("
    assert texts[0].startswith(wanted) and texts[0] == texts[1]
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_gradient_that_is_nan_on_one_replica_ends_the_run(tokens: Path, tmp_path: Path, zero_stage: int) -> None:
    texts = errors_of("gradient", config_for(tokens, tmp_path, zero_stage=zero_stage))
    assert texts[0].startswith("NonFiniteError: step 3: loss=") and texts[0] == texts[1]
    assert "gradient_norm=nan" in texts[0]
    assert texts[0].endswith("first such gradient: blocks.1.mlp.projection.weight on rank 1")
    assert RunFolder(tmp_path).read_metrics()[-1]["step"] == 2


def trained_by_the_clock(rank: int, world_size: int, config: TrainConfig) -> dict[str, torch.Tensor]:
    trainer_module.time = Clock()  # type: ignore[assignment]
    return trained_weights(rank, world_size, config)


def test_metrics_that_are_read_late_are_the_same(tokens: Path, tmp_path: Path) -> None:
    """Also across an evaluation and a checkpoint, before which all steps are finished; the same weights and times."""
    runs = {}
    for late in (False, True):
        changes = {"read_metrics_late": late, "eval_interval": 3, "checkpoint_interval": 4}
        weights = run_on_ranks(
            trained_by_the_clock, 2, config_for(tokens, tmp_path / str(late), **changes), timeout_s=100
        )
        records = RunFolder(tmp_path / str(late)).read_metrics()
        clocks = ("mfu", "peak_memory_bytes", "time")
        runs[late] = weights, [{k: v for k, v in record.items() if k not in clocks} for record in records]
    assert runs[True][1] == runs[False][1]
    assert [record["step"] for record in runs[True][1]] == [1, 2, 3, 3, 4, 5, 5]
    for late, at_once in zip(runs[True][0], runs[False][0], strict=True):
        assert all(torch.equal(late[name], weight) for name, weight in at_once.items())


def kept_after_a_fault(rank: int, world_size: int, config: TrainConfig) -> bool:
    """Train with a NaN in step 3; return whether the weights after the error are the weights after step 2."""
    after: dict[int, list[torch.Tensor]] = {}
    trainers, begin = [], Trainer._begin_step

    def begin_step(self: Trainer) -> Any:
        trainers.append(self)
        after[self.progress.step] = [self.optimizer.main[name].clone() for name in self.parameters]
        return begin(self)

    Trainer._begin_step = begin_step  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError) as caught:
        with_a_fault(rank, world_size, config, "gradient")
    assert str(caught.value).startswith("step 3: loss=") and "not updated" in str(caught.value)
    assert ("first such gradient" in str(caught.value)) != config.training.read_metrics_late
    assert max(after) == (3 if config.training.read_metrics_late else 2)  # late: step 4 was begun, and refused
    weights = [trainers[0].optimizer.main[name] for name in trainers[0].parameters]
    assert not any(map(torch.equal, weights, after[1]))
    return all(map(torch.equal, weights, after[2]))


@pytest.mark.parametrize("late", [False, True])
def test_no_weight_changes_after_a_step_that_is_not_finite(tokens: Path, tmp_path: Path, late: bool) -> None:
    config = config_for(tokens, tmp_path, read_metrics_late=late, zero_stage=0)
    assert run_on_ranks(kept_after_a_fault, 2, config, timeout_s=100) == [True, True]
    assert RunFolder(tmp_path).read_metrics()[-1]["step"] == 2


@pytest.mark.parametrize("late", [False, True])
def test_a_stop_saves_the_last_finished_step(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Asked in step 2: at once after it, or after the step that had begun when the host read of it."""
    begin = Trainer._begin_step

    def begin_step(self: Trainer) -> Any:
        self._stop.asked = "SIGTERM" if self.progress.step == 1 else self._stop.asked
        return begin(self)

    monkeypatch.setattr(Trainer, "_begin_step", begin_step)
    train(config_for(tokens, tmp_path, read_metrics_late=late), tmp_path)
    last = 3 if late else 2
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == [f"step-00000{last}"]
    assert [record["step"] for record in RunFolder(tmp_path).read_metrics()] == list(range(1, last + 1))


def test_only_adamw_reads_metrics_late(tokens: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        optimizer = OptimizerConfig(kind=kind)
        weight = {"a": torch.zeros(2, 2)}
        if kind != "muon":  # its matrices have another rule besides AdamW's
            assert Optimizer(weight, weight, optimizer).refuses_on_device == (kind == "adamw")
        if kind != "adamw":
            with pytest.raises(InputError, match=f"read_metrics_late=True must be false with optimizer.kind='{kind}'"):
                dataclasses.replace(config_for(tokens, tmp_path, read_metrics_late=True), optimizer=optimizer)


def test_a_thread_reads_the_rows_of_the_next_step(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row once, none beyond the last step; an error of the thread is the error of the run."""
    reads: list[tuple[str, int]] = []
    read = TrainingData.training_batch

    def training_batch(self: TrainingData, first: int, *rest: int) -> Batch:
        reads.append((threading.current_thread().name, first))
        if first == fails_at:
            raise InputError("a page cannot be read")
        return read(self, first, *rest)

    monkeypatch.setattr(TrainingData, "training_batch", training_batch)
    for folder, fails_at in (("all", None), ("some", 12)):
        reads.clear()
        with pytest.raises(InputError, match="a page cannot be read") if fails_at else contextlib.nullcontext():
            train(config_for(tokens, tmp_path / folder), tmp_path / folder)
        assert reads == [(THREAD_NAME, first) for first in ((0, 4, 8, 12, 16) if fails_at is None else (0, 4, 8, 12))]
        assert THREAD_NAME not in {thread.name for thread in threading.enumerate()}
        assert RunFolder(tmp_path / folder).read_metrics()[-1]["step"] == (3 if fails_at else 5)


def with_a_bad_disk(rank: int, world_size: int, config: TrainConfig, full_at: int | None) -> None:
    """Train. Files of step 2 are written after step 4; the last rank cannot write its file of step `full_at`."""
    train_step, write = Trainer.train_step, save_module._write_file
    at_step_4 = threading.Event()

    def step(self: Trainer) -> str | None:
        if self.progress.step == full_at and rank == world_size - 1:
            self._background._thread.join()  # type: ignore[union-attr]
        stop = train_step(self)
        if self.progress.step >= 4:
            at_step_4.set()
        return stop

    def write_file(path: Path, tensors: Any, step: int) -> dict[str, int]:
        if step == full_at:
            if rank == world_size - 1:
                raise CheckpointError(f"{path.name}: disk full")
        elif step == 2:
            assert at_step_4.wait(100)
        return write(path, tensors, step)

    Trainer.train_step = step  # type: ignore[method-assign]
    save_module._write_file = write_file
    train(config, Path(str(config.training.run_folder)))


def test_a_checkpoint_behind_training_is_the_checkpoint_that_training_waits_for(tokens: Path, tmp_path: Path) -> None:
    """The files are the same byte for byte, though the weights changed twice before they were written."""
    changes = {"checkpoint_interval": 2, "keep_checkpoints": 9}
    behind, waits = tmp_path / "behind", tmp_path / "waits"
    run_on_ranks(with_a_bad_disk, 2, config_for(tokens, behind, **changes), None, timeout_s=100)
    run_on_ranks(trained_weights, 2, config_for(tokens, waits, async_checkpoint=False, **changes), timeout_s=100)
    files = sorted(path.relative_to(waits) for path in waits.glob("checkpoints/*/*.safetensors"))
    assert len(files) == 3 * 2  # steps 2, 4, 5
    for file in files:
        assert (behind / file).read_bytes() == (waits / file).read_bytes(), file


@pytest.mark.parametrize("full_at", [2, 4], ids=["the step after it", "the end"])
def test_a_failed_save_ends_the_run_on_every_rank(tokens: Path, tmp_path: Path, full_at: int) -> None:
    """At the step that follows the failure, or at the end if no step follows; the checkpoint before stays."""
    config = config_for(tokens, tmp_path, checkpoint_interval=2, num_steps=4 if full_at == 4 else 5)
    with pytest.raises(RankError) as caught:
        run_on_ranks(with_a_bad_disk, 2, config, full_at, timeout_s=100)
    texts = [f"{type(error).__name__}: {error}" for error in caught.value.errors.values()]
    assert texts == ["SharedCheckpointError: rank 1: rank-00001-of-00002.safetensors: disk full"] * 2
    assert RunFolder(tmp_path).read_metrics()[-1]["step"] == full_at
    kept = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert kept == (["step-000002"] if full_at == 4 else [])


class Clock:
    """Clock by which step n takes n / 2 seconds."""

    def __init__(self) -> None:
        self.now, self.calls = 100.0, 0

    def perf_counter(self) -> float:
        self.calls += 1
        self.now += self.calls / 4 if self.calls % 2 == 0 else 0.0
        return self.now


def timed(rank: int, world_size: int, config: TrainConfig) -> None:
    trainer_module.time = Clock()  # type: ignore[assignment]
    trainer_module.product_flops_per_s = lambda device, dtype: 1e9 * (rank + 1)
    train(config, Path(str(config.training.run_folder)))


def test_figures_are_those_computed_apart(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On text and two replicas: predicted tokens and bytes, bits per byte, tokens per second."""
    pages = [f"Page {i}: " + " ".join(f"word {i * j % 17} and {j}." for j in range(30)) for i in range(40)]
    (tmp_path / "pages.jsonl").write_text("\n".join(json.dumps({"text": page}) for page in pages))
    changes: dict[str, Any] = {
        "path": str(tmp_path / "pages.jsonl"),
        "tokenizer_vocab_size": 280,
        "cache_folder": str(tmp_path / "c"),
    }
    changes["log_interval"] = 2
    config = config_for(tmp_path, tmp_path / "run", **changes)
    run_on_ranks(timed, 2, config, timeout_s=100)
    records = RunFolder(tmp_path / "run").read_metrics()
    (evaluation,) = [record for record in records if "validation_loss" in record]
    # Held out: a tenth of the pages, evenly spread; each ends with a token that has no bytes.
    held_out = [page for i, page in enumerate(pages) if i % 10 == 9]
    data = open_training_data(config, lambda *_: None)
    assert data.tokenizer is not None
    tokens = [token for page in held_out for token in [*data.tokenizer.encode(page), data.tokenizer.end_of_document]]
    assert evaluation["validation_tokens"] == len(tokens) - 1
    num_bytes = sum(len(page.encode()) for page in held_out) - len(data.tokenizer.decode(tokens[:1]).encode())
    bits = evaluation["validation_loss"] * (len(tokens) - 1) / math.log(2) / num_bytes
    assert evaluation["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    # All ranks together read 4 samples of 12 tokens a step; the speed is the (upper) median of the steps so far.
    speeds = [record["tokens_per_s"] for record in records if "loss" in record]
    assert speeds == [round(4 * 12 / seconds, 1) for seconds in (0.5, 1.0, 1.0, 1.5, 1.5)]
    steps = [record for record in records if "loss" in record]
    assert [record["step_s"] for record in steps] == [0.5, 1.0, 1.5, 2.0, 2.5]
    flops, _ = gpt_step_flops(dataclasses.replace(config.model, vocab_size=data.vocab_size), 4 * 12)
    assert [record["mfu"] for record in steps] == [
        pytest.approx(flops / record["step_s"] / (1e9 + 2e9)) for record in steps
    ]
    assert all(1e7 < record["peak_memory_bytes"] < 1e11 for record in steps)
    times = [datetime.fromisoformat(record["time"].replace("Z", "+00:00")) for record in records]
    assert times == sorted(times) and abs((datetime.now(timezone.utc) - times[0]).total_seconds()) < 3600
    figures = [
        f"norm {record['gradient_norm']:.2f} MFU {record['mfu']:.1%} {record['peak_memory_bytes'] / 1e9:.1f} GB"
        for record in steps
    ]
    # The output for the user.
    printed = re.sub(r"[^\S\n]+", " ", capfd.readouterr().out.replace("\u2502", " "))
    losses = [record["loss"] for record in records if "loss" in record]
    for line in (
        f"step 2/5 loss {losses[1]:.4f} 48 tokens/s 1.00 s/step {figures[1]} ETA 3 s\n",
        f"step 4/5 loss {losses[3]:.4f} 32 tokens/s 2.00 s/step {figures[3]} ETA 2 s\n",
        f"step 5/5 loss {losses[4]:.4f} 32 tokens/s 2.50 s/step {figures[4]} ETA 0 s\n",
        f" training loss {losses[0]:.3f} -> {losses[4]:.3f} nats per token \n",
        " speed 48 tokens/s \n",
        f" held-out loss {evaluation['validation_loss']:.3f} nats per token \n",
        f" held-out bits per byte {bits:.3f} \n",
        f"{evaluation['validation_loss']:.4f} nats per token, {bits:.3f} bits per byte over {len(tokens) - 1} tokens\n",
    ):
        assert line in printed
