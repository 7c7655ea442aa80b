"""Start here when a run with PipeDream or PipeDream-2BW does not resume bit for bit, or accepts what has no meaning."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.checkpoint import read_manifest
from fused_megatron.checkpoint.run_folder import CLOCK_FIELDS
from fused_megatron.checks import InputError
from fused_megatron.models import GPT
from fused_megatron.pipeline.schedule.schedules import ASYNCHRONOUS
from fused_megatron.planning.rank_memory import rank_memory
from fused_megatron.planning.search.pipelines import pipelines
from fused_megatron.testing.run_on_ranks import RankError, run_on_ranks
from fused_megatron.training.train import train

UNTIED: dict[str, Any] = {"tied_embeddings": False}
TWO_BW = UNTIED | {"schedule": "pipedream_2bw", "pipeline_parallel_size": 2}
STASHING = UNTIED | {"schedule": "pipedream", "pipeline_parallel_size": 2, "global_batch_size": 1}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "recompute": "full"}
CASES = {
    "2bw-bfloat16-dp2": TWO_BW | DROPOUT | {"dtype": "bfloat16", "data_parallel_size": 2},
    "2bw-tp2": TWO_BW | {"tensor_parallel_size": 2, "sequence_parallel": True},
    "2bw-pp4": TWO_BW | {"pipeline_parallel_size": 4, "num_layers": 3},
    "stashing": STASHING | DROPOUT,
    "stashing-pp4": STASHING | {"pipeline_parallel_size": 4, "num_layers": 3, "optimizer": "muon"},
}
FAST = ("2bw-bfloat16-dp2", "stashing")


def without_clocks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in CLOCK_FIELDS} for record in records]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_resumed_run_equals_the_whole_one_bit_for_bit(runs: Any, tmp_path: Path, name: str) -> None:
    case = dict(CASES[name])
    case = case | ({"kind": case.pop("optimizer")} if "optimizer" in case else {})
    expected = without_clocks(runs.trained(tmp_path, **case))
    last = tmp_path / "checkpoints" / "step-000004"
    files = {file.name: file.read_bytes() for file in sorted(last.glob("*.safetensors"))}
    assert len(files) == runs.config(tmp_path, **case).parallel.num_ranks
    runs.lose_last_checkpoint(tmp_path)
    # And the numbers do not depend on how often the pipeline drains.
    assert without_clocks(runs.trained(tmp_path, **case, steps_per_flush=1)) == expected
    assert {name: (last / name).read_bytes() for name in files} == files


def test_versions_of_2bw_fit_another_pipeline(runs: Any, tmp_path: Path) -> None:
    # Each stage clips by its own norm, so that clipping would tell the pipelines apart.
    changes = TWO_BW | DROPOUT | {"clip_norm": 1e6}
    expected = runs.trained(tmp_path, **changes)
    plain = runs.trained(tmp_path / "1f1b", **changes | {"schedule": "1f1b"})
    assert abs(expected[3]["loss"] - plain[3]["loss"]) > 1e-3  # so the comparison below can fail
    runs.lose_last_checkpoint(tmp_path)
    runs.assert_same(runs.trained(tmp_path, **changes | {"pipeline_parallel_size": 1}), expected)


def test_a_synchronous_schedule_leaves_the_versions_out(
    runs: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.trained(tmp_path, **STASHING | {"num_layers": 3, "pipeline_cut": (2, 1)})
    names = read_manifest(tmp_path / "checkpoints" / "step-000004").tensors
    assert {name.split(".")[1] for name in names if "stashed" in name} == {"stashed_1"}  # of the first stage only
    assert not any("stashed" in name and "head" in name for name in names)
    runs.lose_last_checkpoint(tmp_path)
    changes = STASHING | {"num_layers": 3}
    with pytest.raises(RankError, match=r"has older weights of another pipeline: parallel.pipeline_cut=\(2, 1\) there"):
        runs.trained(tmp_path, **changes | {"pipeline_cut": (1, 2)})
    with pytest.raises(RankError, match=r"parallel.schedule=pipedream there, pipedream_2bw here \(resume with"):
        runs.trained(tmp_path, **changes | {"global_batch_size": 2, "schedule": "pipedream_2bw"})
    steps = [r["step"] for r in runs.trained(tmp_path, **changes | {"schedule": "1f1b"}) if "loss" in r]
    assert steps == [1, 2, 3, 4]
    assert "another update rule: parallel.schedule=pipedream there, 1f1b here" in capfd.readouterr().out
    assert not any("stashed" in name for name in read_manifest(tmp_path / "checkpoints" / "step-000004").tensors)


def held_bytes(rank: int, world_size: int, config: Any) -> int:
    """Train, and return the bytes of all versions of this rank's weights."""
    kept: list[Any] = []
    from fused_megatron.training import train as train_module  # noqa: PLC0415 - the module, patched in this process

    original = train_module._conclude

    def conclude(trainer: Any, *rest: Any) -> None:
        for stashed in trainer.executor.stashed.values():
            for version in [{p: p.data for p in trainer.model.parameters()}, *stashed.older()]:
                kept.extend(version.values())
        original(trainer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "_conclude", conclude)
        train(config, Path(config.training.run_folder))
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}.values())


@pytest.mark.parametrize(("case", "versions"), [(TWO_BW, [2, 2]), (STASHING, [2, 1])], ids=["2bw", "stashing"])
def test_memory_has_every_version_once(runs: Any, tmp_path: Path, case: dict[str, Any], versions: list[int]) -> None:
    config = runs.config(tmp_path, **case, vocab_size=300)
    for rank, held in enumerate(run_on_ranks(held_bytes, 2, config, timeout_s=100)):
        planned = rank_memory(config, rank)
        assert held == planned.weights == versions[rank] * 4 * planned.num_parameters


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"zero_stage": 2, "data_parallel_size": 2}, "zero_stage=2 must be 0 or 1"),
    ({"zero_stage": 3, "data_parallel_size": 2}, "zero_stage=3 must be 0 or 1"),
    ({"tied_embeddings": True}, "tied_embeddings=True must be false"),
    ({"num_experts": 2}, "num_experts=2 must not be given"),
    ({"cuda_graphs": "block", "pipeline_parallel_size": 1}, "cuda_graphs='block' must be 'off'"),
    ({"read_metrics_late": True}, "read_metrics_late=True must be false"),
    ({"cluster": "h100"}, "cluster='h100' must not be given"),
    ({"stages_per_rank": 2, "num_layers": 4}, "stages_per_rank=2 must be 1 for pipedream_2bw"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_has_no_meaning_is_refused(runs: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = runs.config(tmp_path, **TWO_BW | changes)
    with pytest.raises(InputError) as error:
        plan_pipeline(config, asynchronous=True)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_too_few_microbatches_and_other_commands(runs: Any, tmp_path: Path) -> None:
    config = runs.config(tmp_path, **TWO_BW | {"global_batch_size": 1})
    with pytest.raises(InputError, match="needs as many microbatches as pipeline ranks: 1 must be at least 2"):
        config.check_data_parallel(1)
    with pytest.raises(
        InputError, match="changes the update rule: only train and dry-run take it; here one of: gpipe, 1f1b"
    ):
        plan_pipeline(runs.config(tmp_path, **TWO_BW))
    assert not {name for name, _ in pipelines(4, 16)} & set(ASYNCHRONOUS)  # the planner never picks them


def poisoned(rank: int, world_size: int, config: Any) -> None:
    """Train with a loss that is NaN in the third step."""
    calls: list[int] = []
    original = GPT.loss

    def loss(self: GPT, *arguments: Any, **keywords: Any) -> torch.Tensor:
        calls.append(0)
        found = original(self, *arguments, **keywords)
        return found * float("nan") if self.training and sum(1 for _ in calls) == 3 else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "loss", loss)
        train(config, Path(config.training.run_folder))


def test_a_loss_that_is_not_finite_stops_every_rank_before_a_save(runs: Any, tmp_path: Path) -> None:
    config = runs.config(tmp_path, **STASHING | {"eval_interval": 4, "checkpoint_interval": 4})
    with pytest.raises(
        RankError, match="step 3: loss=nan gradient_norm=nan: not finite, stages whose gradients"
    ) as error:
        run_on_ranks(poisoned, 2, config, timeout_s=100)
    assert len(error.value.errors) == 2
    assert not list((tmp_path / "checkpoints").glob("step-*"))
