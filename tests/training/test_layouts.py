"""Start here when a GPT trains differently at some layout, or does not resume bit for bit."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_megatron.checkpoint import read_manifest
from fused_megatron.checkpoint.run_folder import CLOCK_FIELDS, RunFolder
from fused_megatron.checks import InputError
from fused_megatron.config import DataConfig, GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.testing.run_on_ranks import RankError, run_on_ranks
from fused_megatron.training import train as training
from fused_megatron.training.generate_text import GenerateArguments, generate_text
from fused_megatron.training.train import train

# Each run draws its loss plot: imported once here, matplotlib is shared by all forked ranks.
with contextlib.suppress(ImportError):
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

NUM_STEPS = 6
# The other form of every layer; every rank holds its one key-value head.
LLAMA: dict[str, Any] = {
    "activation": "swiglu", "normalization": "rms_norm", "position": "rotary", "num_kv_heads": 1,
    "hidden_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write some pages that repeat themselves enough to be learnt."""
    path = tmp_path_factory.mktemp("text") / "pages.jsonl"
    lines = [
        json.dumps({"text": " ".join(f"line {i * j % 17} of page {i} says {'ab' * (i % 5)}." for j in range(40))})
        for i in range(60)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def config_for(text: Path, run: Path, **changes: Any) -> TrainConfig:
    """Return the config of a run of seconds; `changes` are fields by name, each of the first section that has it."""
    sections: dict[str, Any] = {
        "model": GPTConfig(num_layers=2, hidden_size=32, num_heads=4, seq_len=24),
        "parallel": ParallelConfig(timeout_s=120),
        "data": DataConfig(path=str(text), cache_folder=str(text.parent / "cache"), tokenizer_vocab_size=300),
        "optimizer": OptimizerConfig(lr=3e-3, min_lr=1e-4, warmup_steps=3),
        "training": TrainingConfig(
            num_steps=NUM_STEPS, global_batch_size=8, microbatch_size=2, eval_interval=3, eval_batches=2,
            checkpoint_interval=2, keep_checkpoints=10, replica_check_interval=2, run_folder=str(run),
        ),
    }  # fmt: skip
    for name, section in sections.items():
        fields = {f.name for f in dataclasses.fields(section)}
        taken = {key: changes.pop(key) for key in fields & changes.keys()}
        sections[name] = dataclasses.replace(section, **taken)
    return TrainConfig(**sections)


def run_training(rank: int, world_size: int, config: TrainConfig) -> None:
    train(config, Path(str(config.training.run_folder)))


def trained(text: Path, run: Path, world_size: int = 1, **changes: Any) -> list[dict[str, Any]]:
    """Train on this number of ranks; return the metrics."""
    run_on_ranks(run_training, world_size, config_for(text, run, **changes), timeout_s=300)
    return RunFolder(run).read_metrics()


@pytest.fixture(scope="module")
def one_process(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Return the loss curve of one process, to which every layout is compared."""
    run = tmp_path_factory.mktemp("one")
    return run, trained(text, run)


def assert_same_curve(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("loss", "gradient_norm", "validation_loss", "bits_per_byte"):
            if key in theirs:
                tolerance = 1e-5 if theirs["step"] <= 10 else 1e-4
                assert abs(ours[key] - theirs[key]) <= tolerance * abs(theirs[key]), (ours, theirs)


def test_one_process_learns(one_process: tuple[Path, list[dict[str, Any]]]) -> None:
    _, records = one_process
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == NUM_STEPS
    assert 5.6 < losses[0] < 5.9  # ln(300) = 5.70
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(("world_size", "changes"), [
    pytest.param(2, {"tensor_parallel_size": 2}, marks=pytest.mark.slow),
    (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    pytest.param(4, {"tensor_parallel_size": 4}, marks=pytest.mark.slow),
    pytest.param(2, {}, marks=pytest.mark.slow),
    pytest.param(4, {"tensor_parallel_size": 2, "bucket_mb": 0.02}, marks=pytest.mark.slow),
    (4, {"tensor_parallel_size": 2, "bucket_mb": 0.02, "zero_stage": 3}),
    *(
        pytest.param(
            8, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "zero_stage": stage}, marks=pytest.mark.slow
        )
        for stage in (1, 3)
    ),
    pytest.param(2, {"pipeline_parallel_size": 2}, marks=pytest.mark.slow),
    pytest.param(4, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, marks=pytest.mark.slow),
], ids=["tp2", "tp2-sp", "tp4", "dp2", "tp2-dp2", "tp2-dp2-zero3", "3d", "3d-zero3", "pp2", "pp2-tp2"])  # fmt: skip
def test_every_layout_has_the_curve_of_one_process(
    text: Path, tmp_path: Path, one_process: Any, world_size: int, changes: dict[str, Any]
) -> None:
    assert_same_curve(trained(text, tmp_path, world_size, **changes), one_process[1])


def test_untied_head_and_larger_microbatches(text: Path, tmp_path: Path) -> None:
    one = trained(text, tmp_path / "one", 1, num_steps=4, tied_embeddings=False, microbatch_size=8)
    two = trained(text, tmp_path / "two", 2, num_steps=4, tied_embeddings=False, tensor_parallel_size=2)
    assert_same_curve(two, one)


def test_bfloat16_follows_float32(text: Path, tmp_path: Path, one_process: Any) -> None:
    records = trained(text, tmp_path, 2, tensor_parallel_size=2, dtype="bfloat16")
    for ours, theirs in zip(records, one_process[1], strict=True):
        key = "loss" if "loss" in theirs else "validation_loss"
        # bfloat16 keeps 8 bits: an error of 2^-8 of the loss, and the runs drift apart a little.
        assert abs(ours[key] - theirs[key]) < 0.01 * theirs[key]


@pytest.mark.parametrize(("axis", "ranks", "dtype"), [
    ("tensor", 2, "bfloat16"),
    pytest.param("pipeline", 2, "bfloat16", marks=pytest.mark.slow),
    pytest.param("tensor", 1, "float32", marks=pytest.mark.slow),
    pytest.param("tensor", 1, "bfloat16", marks=pytest.mark.slow),
    pytest.param("tensor", 2, "float32", marks=pytest.mark.slow),
])  # fmt: skip
def test_resume_equals_the_uninterrupted_run_bit_for_bit(
    text: Path, tmp_path: Path, axis: str, ranks: int, dtype: str
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    changes = {f"{axis}_parallel_size": ranks, "dtype": dtype}
    expected = trained(text, whole, ranks, num_steps=4, **changes)
    shutil.copytree(whole, halves)
    # As if the process had been killed after step 2: neither its later checkpoint nor its later metrics exist.
    (halves / "checkpoints" / "step-000004").rename(tmp_path / "lost")
    found = trained(text, halves, ranks, num_steps=4, **changes)
    strip = [{k: v for k, v in r.items() if k not in CLOCK_FIELDS} for r in found]
    assert strip == [{k: v for k, v in r.items() if k not in CLOCK_FIELDS} for r in expected]
    for file in sorted((whole / "checkpoints" / "step-000004").glob("*.safetensors")):
        digests = {
            hashlib.sha256((run / "checkpoints" / "step-000004" / file.name).read_bytes()).hexdigest()
            for run in (whole, halves)
        }
        assert len(digests) == 1, file.name


@pytest.mark.parametrize(("world_size", "changes"), [
    (1, {}), pytest.param(4, {"tensor_parallel_size": 4}, marks=pytest.mark.slow),
    pytest.param(4, {"tensor_parallel_size": 2, "sequence_parallel": True}, marks=pytest.mark.slow),
], ids=["tp1", "tp4", "tp2-sp-dp2"])  # fmt: skip
def test_run_saved_at_tp2_resumes_at_another_layout(
    text: Path, tmp_path: Path, one_process: Any, world_size: int, changes: dict[str, Any]
) -> None:
    trained(text, tmp_path, 2, tensor_parallel_size=2)
    for step in ("04", "06"):
        (tmp_path / "checkpoints" / f"step-0000{step}").rename(tmp_path / f"lost-{step}")
    assert_same_curve(trained(text, tmp_path, world_size, **changes), one_process[1])


def test_dropout_and_llama_layers_have_one_curve_at_every_layout_and_resume(text: Path, tmp_path: Path) -> None:
    steps = {"num_steps": 4, "eval_interval": 2, **LLAMA}
    one = trained(text, tmp_path / "one", 1, **steps)
    run = tmp_path / "two"
    two = trained(text, run, 2, tensor_parallel_size=2, microbatch_size=8, recompute="selective", **steps)
    assert_same_curve(two, one)
    lost = run / "checkpoints" / "step-000004"
    lost.rename(tmp_path / "lost")
    again = trained(text, run, 2, tensor_parallel_size=2, microbatch_size=8, recompute="full", **steps)
    strip = [[{k: v for k, v in r.items() if k not in CLOCK_FIELDS} for r in records] for records in (again, two)]
    assert strip[0] == strip[1]
    lost.rename(tmp_path / "lost-again")
    # Two replicas of one whole model, loaded from shards of two ranks that held the same head.
    assert_same_curve(trained(text, run, 2, microbatch_size=4, **steps), one)


# One run after the other: number of ranks, layout, and the step from which the next run resumes.
PIPELINES: list[tuple[int, dict[str, Any], int]] = [
    (8, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "sequence_parallel": True, "bucket_mb": 0.02}, 2),
    (2, {"pipeline_parallel_size": 2, "schedule": "zb_v", "recompute": "full"}, 4),
    (4, {"pipeline_parallel_size": 2, "stages_per_rank": 2, "pipeline_cut": (2, 1, 2, 0)}, 6),
    (1, {"schedule": "interleaved_zero_bubble", "stages_per_rank": 3}, 8),
]  # fmt: skip


@pytest.mark.parametrize(
    "pipelines",
    [
        pytest.param([(4, PIPELINES[0][1], 2), PIPELINES[1]], id="some"),
        pytest.param(PIPELINES, id="all", marks=pytest.mark.slow),
    ],
)
def test_every_pipeline_has_the_curve_of_one_process_and_goes_on_from_any_other(
    text: Path, tmp_path: Path, pipelines: list[tuple[int, dict[str, Any], int]]
) -> None:
    """With tied embeddings and dropout: 3D, both ends of the model on one rank, several stages a rank, one rank."""
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}
    last = 2 * len(pipelines)
    steps = {"num_layers": 5, "num_steps": last, "checkpoint_interval": 2, "eval_interval": 4, **dropout}
    one = trained(text, tmp_path / "one", 1, **steps)
    run = tmp_path / "run"
    for ranks, layout, step in pipelines:
        assert_same_curve(trained(text, run, ranks, **steps, **layout), one)
        assert sorted((run / "checkpoints").iterdir())[-1].name == f"step-{last:06d}"
        if "tensor_parallel_size" in layout:
            asked = GenerateArguments(run, "line 3 of page", num_tokens=10)
            assert run_on_ranks(generated, 1, asked) == run_on_ranks(generated, 2, asked)[:1]
        for later in range(step + 2, last + 2, 2):
            (run / "checkpoints" / f"step-{later:06d}").rename(tmp_path / f"{ranks} {later}")


def generated(rank: int, world_size: int, arguments: GenerateArguments) -> str:
    return generate_text(arguments)


def test_text_is_the_same_at_every_tensor_parallel_size(one_process: Any) -> None:
    arguments = GenerateArguments(one_process[0], "line 3 of page", num_tokens=30, seed=4)
    texts = {text for ranks in (1, 2, 4) for text in run_on_ranks(generated, ranks, arguments)}
    assert len(texts) == 1 and texts.pop().startswith("line 3 of page")


def test_generate_needs_heads_that_divide(one_process: Any) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(generated, 3, GenerateArguments(one_process[0], "line"))
    assert "cannot be divided over tensor_parallel_size=3 (sizes that can: 1, 2, 4)" in str(caught.value.errors[2])


def replicated_weights(rank: int, world_size: int, config: TrainConfig) -> dict[str, torch.Tensor]:
    from fused_megatron.assembly import training_step  # noqa: PLC0415 - only the ranks need it
    from fused_megatron.tensor_parallel import parameter_parts  # noqa: PLC0415
    from fused_megatron.training import train as training  # noqa: PLC0415

    kept: dict[str, torch.Tensor] = {}
    gradients: dict[torch.nn.Parameter, torch.Tensor] = {}
    conclude, start_sums = training._conclude, training_step.start_sums

    def keep_loss(assembly: Any, loss_sum: torch.Tensor, *rest: Any) -> Any:
        step = sum(name.startswith("loss ") for name in kept)
        kept[f"loss {assembly.mesh.dp_rank} {step}"] = loss_sum.clone()
        gradients.update((p, assembly.gradients[p].clone()) for p in assembly.parameters.values())  # before the update
        return start_sums(assembly, loss_sum, *rest)

    def keep(trainer: Any, *rest: Any) -> None:
        for name, parameter in trainer.parameters.items():
            for part in parameter_parts(parameter):
                real = tuple(slice(n) for n in part.shard.real_shape(part.of(parameter).shape))
                value = part.of(parameter.detach())[real]
                if value.shape == part.shard.full_shape:  # a whole tensor, or a key-value head that every rank holds
                    kept[part.full_name(name)] = value.clone()
                    kept[f"grad {part.full_name(name)}"] = part.of(gradients[parameter])[real].clone()
        conclude(trainer, *rest)

    training._conclude, training_step.start_sums = keep, keep_loss
    train(config, Path(str(config.training.run_folder)))
    return kept


def test_both_ends_of_a_pipeline_keep_one_tied_embedding(text: Path, tmp_path: Path) -> None:
    config = config_for(text, tmp_path, num_steps=4, pipeline_parallel_size=2, clip_norm=0.1)
    first, last = run_on_ranks(replicated_weights, 2, config)
    shared = {name for name in first.keys() & last.keys() if not name.startswith("loss ")}
    assert shared == {"token_embedding.weight", "grad token_embedding.weight"}
    assert all(torch.equal(first[name], last[name]) for name in shared)
    # The norm that clipping used counts the embedding once.
    assert last.keys() - shared > {"final_norm.weight", "blocks.1.mlp.expansion.weight"}
    squares = sum(
        tensor.double().square().sum() for name, tensor in {**first, **last}.items() if name.startswith("grad ")
    )
    assert RunFolder(tmp_path).read_metrics()[-2]["gradient_norm"] == pytest.approx(squares.sqrt().item(), rel=1e-6)


@pytest.mark.parametrize(("sequence_parallel", "changes"), [
    *(pytest.param(flag, {}, marks=pytest.mark.slow) for flag in (False, True)), (True, LLAMA),
], ids=str)  # fmt: skip
def test_replicated_weights_gradients_and_loss_stay_bitwise_equal(
    text: Path, tmp_path: Path, sequence_parallel: bool, changes: dict[str, Any]
) -> None:
    # In stage 0 every replica has whole gradients.
    layout = {"tensor_parallel_size": 2, "sequence_parallel": sequence_parallel, "zero_stage": 0}
    config = config_for(text, tmp_path, num_steps=3, **layout, **changes)
    ranks = run_on_ranks(replicated_weights, 4, config, timeout_s=300)
    assert len(ranks[0]) > 20
    assert not changes or "grad blocks.1.attention.query_key_value.weight.key" in ranks[0]
    for i, mine in enumerate(ranks):
        assert sum(name.startswith("loss") for name in mine) == 3
        for other in ranks[:i]:  # the loss of only this data-parallel rank's samples
            assert all(torch.equal(mine[name], other[name]) for name in mine.keys() & other.keys())
        assert mine.keys() == ranks[i - i % 2].keys()


def test_a_run_that_is_done_is_left_alone(text: Path, tmp_path: Path, one_process: Any) -> None:
    run, records = one_process
    assert trained(text, run) == records


def test_loss_picture_and_config_are_there(one_process: Any) -> None:
    run, _ = one_process
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "num_layers = 2" in (run / "config.toml").read_text()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004", "step-000006"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"hidden_size": 48}, "is of another model: hidden_size=32 there, hidden_size=48 here"),
    ({"tensor_parallel_size": 4, "data_parallel_size": 1},
     "tensor_parallel_size=4 x pipeline_parallel_size=1 x data_parallel_size=1 = 4 must equal the world size 2"),
    ({"microbatch_size": 8}, "global_batch_size=8 must be divisible by"),
    ({"pipeline_parallel_size": 2, "schedule": "1f2b"}, "schedule='1f2b' must be one of: gpipe, 1f1b"),
    ({"vocab_size": 100}, "model.vocab_size=100 must be at least 300"),
], ids=["other-model", "world-size", "batch", "schedule", "vocab"])  # fmt: skip
def test_mistakes_reach_every_rank(
    text: Path, tmp_path: Path, one_process: Any, changes: dict[str, Any], message: str
) -> None:
    run = one_process[0] if "hidden_size" in changes else tmp_path
    with pytest.raises(RankError) as caught:
        run_on_ranks(run_training, 2, config_for(text, run, **changes), timeout_s=300)
    assert all(message in str(caught.value.errors[rank]) for rank in (0, 1))


def of_two_minds(rank: int, world_size: int, config: TrainConfig) -> None:
    training = dataclasses.replace(config.training, num_steps=NUM_STEPS + rank)
    run_training(rank, world_size, dataclasses.replace(config, training=training))


def test_checkpoint_from_before_a_setting_existed(
    text: Path, one_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing setting had its present default; a setting that does not affect the weights may change."""
    manifest = read_manifest(one_process[0] / "checkpoints" / "step-000006")
    old = {k: v for k, v in manifest.state["config"]["model"].items() if k not in {*LLAMA, "recompute"}}
    state = {**manifest.state, "config": {"model": old}}
    monkeypatch.setattr(training, "read_run_state", lambda checkpoint: state)
    config = config_for(text, text)
    model = dataclasses.replace(config.model, vocab_size=300)
    training._state_of_same_run(
        text, dataclasses.replace(model, recompute="full", hidden_dropout=0.5), config, lambda: None
    )
    with pytest.raises(InputError, match="activation=gelu there, activation=swiglu here"):
        training._state_of_same_run(text, dataclasses.replace(model, activation="swiglu"), config, lambda: None)


def test_ranks_of_different_configs(text: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(of_two_minds, 2, config_for(text, tmp_path), timeout_s=300)
    for rank in (0, 1):
        assert "training.num_steps=6 on rank 0 but 7 on rank 1" in str(caught.value.errors[rank])


def poisoned(rank: int, world_size: int, config: TrainConfig, kind: str) -> None:
    from fused_megatron.models import GPT  # noqa: PLC0415 - only the ranks need it

    forward, calls = GPT.forward, [0]

    def poison(self: GPT, *arguments: Any, **keywords: Any) -> torch.Tensor:
        result = forward(self, *arguments, **keywords)
        calls[0] += self.training and torch.is_grad_enabled()
        # In step 3, with 4 microbatches a step, on one rank only.
        if calls[0] == 2 * 4 + 2 and rank == world_size - 1 and torch.is_grad_enabled():
            result = result * float(kind) if kind != "gradient" else result + (result - result).sqrt()
        return result

    GPT.forward = poison  # type: ignore[method-assign]
    train(config, Path(str(config.training.run_folder)))


@pytest.mark.parametrize(("kind", "axis"), [
    ("nan", "tensor"), ("gradient", "pipeline"),
    *(pytest.param(kind, "tensor", marks=pytest.mark.slow) for kind in ("inf", "gradient")),
])  # fmt: skip
def test_a_loss_or_gradient_that_is_not_finite_stops_every_rank(
    text: Path, tmp_path: Path, kind: str, axis: str
) -> None:
    with pytest.raises(RankError) as caught:
        config = config_for(text, tmp_path, **{f"{axis}_parallel_size": 2})
        run_on_ranks(poisoned, 2, config, kind, timeout_s=300)
    texts = [str(caught.value.errors[rank]) for rank in (0, 1)]
    assert all(text.startswith("step 3: loss=") for text in texts)
    assert kind != "gradient" or all("first such gradient: position_embedding on rank 0" in text for text in texts)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert RunFolder(tmp_path).read_metrics()[-1]["step"] == 2


def killed(rank: int, world_size: int, config: TrainConfig) -> None:
    from fused_megatron.models import GPT  # noqa: PLC0415 - only the ranks need it

    forward, calls = GPT.forward, [0]

    def kill(self: GPT, *arguments: Any, **keywords: Any) -> torch.Tensor:
        calls[0] += self.training
        # In step 3, with 2 microbatches a step.
        if calls[0] == 6 and rank == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, *arguments, **keywords)

    GPT.forward = kill  # type: ignore[method-assign]
    run = Path(str(config.training.run_folder))
    try:
        train(config, run)
    except RuntimeError as error:
        (run / f"rank-{rank}").write_text(str(error))
        os._exit(1)  # as the command does: a rank that waits for this one must be told, too


def test_every_rank_names_one_that_was_killed_and_the_run_resumes(text: Path, tmp_path: Path) -> None:
    changes = {"num_steps": 4, "pipeline_parallel_size": 2, "data_parallel_size": 2}
    with pytest.raises(RankError):
        run_on_ranks(killed, 4, config_for(text, tmp_path, **changes), timeout_s=300)
    # Rank 0 exchanges nothing with rank 3: it only sees 1 and 2 leave.
    for rank in range(3):
        assert "lost contact with rank 3 (" in (tmp_path / f"rank-{rank}").read_text()
    assert [r["step"] for r in trained(text, tmp_path, 4, **changes) if "loss" in r] == list(range(1, 5))
