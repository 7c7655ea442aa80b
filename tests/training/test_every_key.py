"""Start here when a config key has no effect, or a wrong effect; a new key needs a row here."""

import dataclasses
import json
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from fused_megatron.assembly import assemble as assemble_module
from fused_megatron.assembly.assemble import Assembly, assemble
from fused_megatron.assembly.build import build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.checkpoint import save as save_module
from fused_megatron.checkpoint.model_state import buffer_boxes
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import InputError
from fused_megatron.config import (
    BERTConfig,
    DataConfig,
    GPTConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    TrainingConfig,
)
from fused_megatron.data.training_data import TrainingData, open_training_data
from fused_megatron.mesh import init_mesh
from fused_megatron.models import BatchSlice, new_model
from fused_megatron.modules.auxiliary_loss import WithAuxiliaryLoss, split_auxiliary_loss
from fused_megatron.training.progress import Reporter
from fused_megatron.training.train import train
from fused_megatron.training.trainer import Trainer

SECTIONS: dict[str, Any] = {
    "model": GPTConfig,
    "bert": BERTConfig,
    "parallel": ParallelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "training": TrainingConfig,
}
BASE: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "seq_len": 12, "vocab_size": 300},
    "parallel": {},
    "data": {"tokenizer_vocab_size": 280, "validation_fraction": 0.1},
    "optimizer": {"warmup_steps": 1, "lr": 1e-2},
    "training": {
        "num_steps": 4,
        "global_batch_size": 4,
        "microbatch_size": 2,
        "eval_interval": 2,
        "eval_batches": 1,
        "log_interval": 2,
        "checkpoint_interval": 2,
        "replica_check_interval": 0,
    },
}


def config_of(folder: Path, changes: dict[str, Any]) -> TrainConfig:
    """Return BASE with changes by "section.key"; a key of "bert" makes the model a BERT."""
    fields = {name: dict(section) for name, section in BASE.items()}
    kind: Any = GPTConfig
    for name, value in {"data.path": folder / "text", "data.cache_folder": folder / "cache", **changes}.items():
        section, key = name.split(".")
        kind = BERTConfig if section == "bert" or value == "bert" else kind
        fields["model" if section == "bert" else section][key] = str(value) if isinstance(value, Path) else value
    return TrainConfig(
        kind(**fields["model"]),
        ParallelConfig(**fields["parallel"]),
        DataConfig(**fields["data"]),
        OptimizerConfig(**fields["optimizer"]),
        TrainingConfig(**fields["training"]),
    )


@dataclasses.dataclass
class Tried:
    """A config and the results of running it, computed on demand."""

    config: TrainConfig
    folder: Path
    _result: tuple[Trainer, list[dict[str, Any]]] | None = None

    def data(self) -> TrainingData:
        return open_training_data(self.config, lambda *_: None)

    def assembly(self) -> Assembly:
        mesh, plan = init_mesh(), plan_pipeline(self.config, asynchronous=True)
        return assemble(self.config, mesh, plan, build_stages(self.config, mesh, plan, torch.device("cpu")))

    def trained(self) -> tuple[Trainer, list[dict[str, Any]]]:
        """Train once; return the trainer after the last step, and the records of the run."""
        if self._result is not None:
            return self._result
        run = RunFolder(self.folder / "run")
        run.create()
        if self.config.training.tensorboard:
            run.open_tensorboard(0)
        trainer = Trainer(self.assembly(), self.data(), run, Reporter(True, self.config.training.log_interval))
        trainer.run()
        self._result = trainer, run.read_metrics()
        return self._result

    def curve(self, *names: str) -> list[Any]:
        return [record[name] for record in self.trained()[1] for name in names if name in record]

    def model(self) -> Any:
        return new_model(self.config.model, seed=self.config.training.seed)

    def loss(self) -> float:
        """Compute the loss of the model on fixed tokens, in training mode."""
        tokens = torch.arange(2 * 12).view(2, 12) % 300
        model = self.model()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases, too, must differ from their initial values
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        loss, _ = split_auxiliary_loss(model(tokens, tokens, batch_slice=BatchSlice(0, 0, 2)))
        return loss.detach().double().sum().item()

    def saved_bytes(self) -> int:
        """Return the bytes that are kept for backward."""
        kept, tokens = [], torch.arange(2 * 12).view(2, 12)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            self.model()(tokens, tokens).sum()
        return sum(kept)

    def shapes(self) -> dict[str, Any]:
        return {name: tuple(p.shape) for name, p in self.model().named_parameters()}


class Row(NamedTuple):
    """Effect of a key.

    Attributes:
        value: another value than in BASE.
        seen: computes the observation in which the key has an effect.
        wanted: the expected observation; CHANGED: any other than with BASE and `also`.
        also: further settings without which the key has no effect.
    """

    value: Any
    seen: Callable[[Tried], Any]
    wanted: Any
    also: Mapping[str, Any] = MappingProxyType({})


CHANGED = object()
OVERLAPPING = {"parallel.schedule": "pipedream_2bw"}


def updated(tried: Tried) -> list[float]:
    """Weights after two updates from gradients of different sizes."""
    assembly = tried.assembly()
    for size in (0.5, 2e-3):
        for parameter in assembly.parameters.values():
            assembly.gradients[parameter].fill_(size)
        assembly.optimizer.step(1e-2)
    return [parameter.detach().double().sum().item() for parameter in assembly.parameters.values()]


def steps_of(name: str) -> Callable[[Tried], Any]:
    return lambda tried: [record["step"] for record in tried.trained()[1] if name in record]


def saved(tried: Tried, folder: str = "checkpoints") -> list[str]:
    return sorted(path.name for path in (tried.trained()[0].run_folder.path / folder).glob("*"))


def first_rows(tried: Tried) -> Any:
    return tried.data().training_batch(0, 4, 0, 1).inputs.tolist()


def everything_of_seed(tried: Tried) -> Any:
    """Return weights, order of the data and dropout states: a seed must change all of them."""
    torch.manual_seed(0)
    weights = [p.sum().item() for p in tried.assembly().parameters.values() if p.dim() > 1]
    dropped = tried.model().dropout_states.tolist()
    return {"weights": weights, "order": first_rows(tried), "dropout": dropped}


def replica_checks(tried: Tried) -> list[int]:
    """Return the steps before which replicas were compared."""
    found: list[int] = []
    original = assemble_module.find_drift
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble_module, "find_drift", lambda *arguments: found.append(1) or original(*arguments))
        tried.trained()
    return found


def saving_threads(tried: Tried) -> list[str]:
    """Return the names of the threads that wrote the files of checkpoints."""
    found: set[str] = set()
    original, thread = save_module.write_shard_file, threading.current_thread
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_module, "write_shard_file", lambda *each: found.add(thread().name) or original(*each))
        tried.trained()
    return sorted(found)


def auxiliary_loss(tried: Tried) -> float:
    """Return the auxiliary loss of the model on fixed tokens, in training mode."""
    tokens = torch.arange(2 * 12).view(2, 12)
    returned = tried.model()(tokens, tokens)
    return returned.auxiliary_loss.item() if isinstance(returned, WithAuxiliaryLoss) else 0.0


def selection_biases(tried: Tried) -> list[list[float]]:
    """Return the least and the greatest selection bias of each router after one step in which one expert had all."""
    assembly = tried.assembly()
    loads = assembly.expert_loads.of_rank(torch.device("cpu"))
    loads[:, 0] = 7.0
    assembly.expert_loads.update(loads)
    biases = [buffer for stage in assembly.model.stages.values() for buffer in buffer_boxes(stage).values()]
    return [[bias.tensor.min().item(), bias.tensor.max().item()] for bias in biases]


def whole_run(tried: Tried) -> tuple[int, str]:
    """Return the number of steps that a whole run logs with a prediction, and torch's precision of its products."""
    train(tried.config, tried.folder / "whole")
    records, precision = RunFolder(tried.folder / "whole").read_metrics(), torch.get_float32_matmul_precision()
    return sum("predicted_s" in record for record in records), precision


LOSS = (Tried.loss, CHANGED)
SHAPES = (Tried.shapes, CHANGED)
ROTARY = {"model.position": "rotary"}
EXPERTS = {"model.num_experts": 8}
GROUPS = EXPERTS | {"model.router_groups": 4, "model.router_groups_per_token": 1}
LLAMA3 = ROTARY | {
    "model.rotary_scaling": "llama3",
    "model.rotary_scaling_factor": 2.0,
    "model.rotary_original_seq_len": 8,
}
YARN = LLAMA3 | {"model.rotary_scaling": "yarn"}
ROWS: dict[str, Row] = {
    "model.family": Row("bert", lambda tried: type(tried.model()).__name__, "BERT"),
    "model.num_layers": Row(3, lambda tried: len(tried.model().blocks), 3),
    "model.hidden_size": Row(32, *SHAPES),
    "model.num_heads": Row(2, *LOSS),
    "model.head_dim": Row(8, *SHAPES),
    "model.seq_len": Row(10, lambda tried: tried.data().training_batch(0, 4, 0, 1).inputs.shape[1], 10),
    "model.ffn_hidden_size": Row(24, *SHAPES),
    "model.vocab_size": Row(600, *SHAPES),
    "model.tied_embeddings": Row(False, *SHAPES),
    "model.layer_norm_eps": Row(1.0, *LOSS),
    "model.init_std": Row(0.1, lambda tried: round(tried.model().token_embedding.weight[:300].std().item(), 2), 0.1),
    "model.pad_vocab_size_to_multiple_of": Row(7, lambda tried: tried.model().token_embedding.weight.shape[0], 301),
    "model.activation": Row("gelu_exact", *LOSS),
    "model.normalization": Row("rms_norm", *LOSS),
    "model.position": Row("rotary", *SHAPES),
    "model.rotary_base": Row(100.0, *LOSS, ROTARY),
    "model.rotary_fraction": Row(0.5, *LOSS, ROTARY),
    "model.rotary_scaling": Row("linear", *LOSS, ROTARY | {"model.rotary_scaling_factor": 2.0}),
    "model.rotary_scaling_factor": Row(3.0, *LOSS, ROTARY | {"model.rotary_scaling": "linear"}),
    "model.rotary_original_seq_len": Row(2, *LOSS, LLAMA3),
    "model.rotary_slow_turns": Row(0.01, *LOSS, LLAMA3),
    "model.rotary_fast_turns": Row(1.1, *LOSS, LLAMA3),
    "model.rotary_attention_factor": Row(2.0, *LOSS, YARN),
    "model.num_kv_heads": Row(2, *SHAPES),
    "model.linear_biases": Row(False, *SHAPES),
    "model.qkv_bias": Row(False, *SHAPES),
    "model.query_key_norm": Row(True, *SHAPES),
    "model.query_key_norm_over": Row("all_heads", *SHAPES, {"model.query_key_norm": True}),
    "model.sliding_window": Row(3, *LOSS),
    "model.hidden_dropout": Row(0.3, *LOSS),
    "model.attention_dropout": Row(0.3, *LOSS),
    "model.attention_dropout_kernel": Row("fast", *LOSS, {"model.attention_dropout": 0.3}),
    "model.embedding_dropout": Row(0.3, *LOSS),
    "model.recompute": Row("full", Tried.saved_bytes, CHANGED),
    "model.recompute_blocks": Row(1, Tried.saved_bytes, CHANGED, {"model.recompute": "full"}),
    "model.num_experts": Row(4, *SHAPES),
    "model.experts_per_token": Row(3, *LOSS, EXPERTS),
    "model.expert_ffn_hidden_size": Row(8, *SHAPES, EXPERTS),
    "model.num_shared_experts": Row(1, *SHAPES, EXPERTS),
    "model.shared_expert_ffn_size": Row(8, *SHAPES, EXPERTS | {"model.num_shared_experts": 1}),
    "model.shared_expert_gate": Row(True, *SHAPES, EXPERTS | {"model.num_shared_experts": 1}),
    "model.moe_every": Row(2, *SHAPES, EXPERTS),
    "model.num_dense_layers": Row(1, *SHAPES, EXPERTS),
    "model.router_scores": Row("sigmoid", *LOSS, EXPERTS),
    "model.router_normalize": Row(False, *LOSS, EXPERTS),
    "model.router_scale": Row(2.5, *LOSS, EXPERTS),
    "model.router_groups": Row(2, *LOSS, GROUPS),
    "model.router_groups_per_token": Row(2, *LOSS, GROUPS),
    "model.router_bias_rate": Row(0.5, selection_biases, [[-0.5, 0.5], [-0.5, 0.5]], EXPERTS),
    "model.balance_loss": Row(0.1, auxiliary_loss, CHANGED, EXPERTS),
    "model.balance_loss_over": Row("step", auxiliary_loss, CHANGED, EXPERTS | {"model.balance_loss": 0.1}),
    "model.router_z_loss": Row(0.1, auxiliary_loss, CHANGED, EXPERTS),
    "model.router_jitter": Row(0.5, *LOSS, EXPERTS),
    "model.capacity_factor": Row(0.5, *LOSS, EXPERTS),
    "bert.num_token_types": Row(3, *SHAPES),
    "bert.post_norm": Row(True, *SHAPES),
    "bert.masked_lm_head": Row(False, *SHAPES),
    "bert.next_sentence_head": Row(True, *SHAPES),
    "data.path": Row(Path("other"), lambda tried: tried.data().description, CHANGED),
    "data.text_field": Row("title", lambda tried: tried.data().fingerprint, CHANGED),
    "data.cache_folder": Row(Path("elsewhere"), lambda tried: str(tried.data().training.dataset.path_prefix), CHANGED),
    "data.tokenizer_vocab_size": Row(290, lambda tried: tried.data().tokenizer.vocab_size, 290),
    "data.tokenizer_path": Row(Path("tokenizer.json"), lambda tried: tried.data().tokenizer.vocab_size, 270),
    "data.validation_fraction": Row(0.3, lambda tried: tried.data().training.samples_per_epoch, CHANGED),
    "data.mask_fraction": Row(0.5, lambda tried: tried.data().targets_per_sample, 5, {"model.family": "bert"}),
    "data.mask_documents": Row(True, lambda tried: tried.data().num_targets(0, 4) < 4 * 12, True),
    "data.reset_positions": Row(
        False,
        lambda tried: tried.data().training_batch(0, 4, 0, 1).positions is None,
        True,
        {"data.mask_documents": True},
    ),
    "optimizer.kind": Row("lion", updated, CHANGED),
    "optimizer.momentum": Row(0.5, updated, CHANGED, {"optimizer.kind": "sgd"}),
    "optimizer.nesterov": Row(True, updated, CHANGED, {"optimizer.kind": "sgd"}),
    "optimizer.adjust_lr_fn": Row("original", updated, CHANGED, {"optimizer.kind": "muon"}),
    "optimizer.state_dtype": Row("bfloat16", updated, CHANGED),
    "optimizer.lr": Row(2e-2, lambda tried: tried.curve("lr")[0], 2e-2),
    "optimizer.min_lr": Row(1e-3, lambda tried: tried.curve("lr")[-1], 1e-3),
    "optimizer.warmup_steps": Row(2, lambda tried: tried.curve("lr")[0], 5e-3),
    "optimizer.beta1": Row(0.7, updated, CHANGED),
    "optimizer.beta2": Row(0.7, updated, CHANGED),
    "optimizer.eps": Row(1e-3, updated, CHANGED),
    "optimizer.weight_decay": Row(0.5, updated, CHANGED),
    "optimizer.clip_norm": Row(1e-3, lambda tried: tried.curve("loss")[2], CHANGED),
    "optimizer.schedule": Row("constant", lambda tried: tried.curve("lr")[-1], 1e-2),
    "optimizer.decay_steps": Row(2, lambda tried: tried.curve("lr"), CHANGED),
    "training.num_steps": Row(3, steps_of("loss"), [1, 2, 3]),
    "training.global_batch_size": Row(6, lambda tried: tried.trained()[0].progress.samples_consumed, 24),
    "training.microbatch_size": Row(1, lambda tried: tried.assembly().executor.schedule.num_microbatches, 4),
    "training.dtype": Row("bfloat16", lambda t: next(iter(t.assembly().parameters.values())).dtype, torch.bfloat16),
    "training.matmul_precision": Row("high", lambda tried: whole_run(tried)[1], "high"),
    "training.seed": Row(5, everything_of_seed, CHANGED, {"model.hidden_dropout": 0.1}),
    "training.eval_interval": Row(3, steps_of("validation_loss"), [3, 4]),
    "training.eval_batches": Row(2, lambda tried: tried.curve("validation_tokens")[0], 2 * 4 * 12),
    "training.checkpoint_interval": Row(3, saved, ["step-000003", "step-000004"], {"training.keep_checkpoints": 9}),
    "training.async_checkpoint": Row(False, saving_threads, ["MainThread"]),
    "training.keep_checkpoints": Row(1, saved, ["step-000004"]),
    "training.bucket_mb": Row(1e-4, lambda tried: len(tried.assembly().gradients._queues[0].buckets) > 1, True),
    "training.read_metrics_late": Row(True, lambda tried: tried.trained()[0]._may_wait(1), True),
    "training.cluster": Row("h100", lambda tried: whole_run(tried)[0], 4),
    "training.profile_steps": Row(1, lambda tried: saved(tried, "profile"), ["rank-0.trace.json"]),
    "training.named_ranges": Row(True, lambda tried: tried.trained()[0]._ranges is not None, True),
    "training.replica_check_interval": Row(2, replica_checks, [1, 1]),
    # Numbers of overlapping steps besides 1; every second step there is an evaluation.
    "parallel.steps_per_flush": Row(1, lambda tried: [*tried.trained()[0].executor._other_steps], [], OVERLAPPING),
}
# Keys whose effect needs a terminal or the files of a command, and the tests that have them.
ELSEWHERE = {
    **dict.fromkeys(
        ["data.weights", *(f"training.{name}" for name in ("run_folder", "log_interval", "tensorboard", "trackers"))],
        "test_lines_and_folders",
    ),
    "training.cuda_graphs": "test_lines_and_folders",
}


def test_every_key_has_a_row() -> None:
    inherited = {field.name for field in dataclasses.fields(GPTConfig)}
    keys = {
        f"{section}.{field.name}"
        for section, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
        if section != "bert" or field.name not in inherited
    }
    layout = {key for key in keys if key.startswith("parallel.") and key not in ROWS}  # test_keys_of_the_layout.py
    assert keys - layout == {*ROWS, *ELSEWHERE}
    assert not {*ROWS} & {*ELSEWHERE}
    assert {field.name for field in dataclasses.fields(TrainConfig)} == {*SECTIONS} - {"bert"}
    assert all(name in globals() for name in ELSEWHERE.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name, word in (("text", "one"), ("other", "two")):
        (folder / name).mkdir()
        pages = [f"Page {i}: " + " ".join(f"{word} {i * j % 17} more" for j in range(30)) for i in range(40)]
        (folder / name / "pages.jsonl").write_text(
            "\n".join(json.dumps({"text": page, "title": page[:40]}) for page in pages)
        )
    return folder


@pytest.fixture(scope="module")
def unchanged(folder: Path) -> Callable[[dict[str, Any]], Tried]:
    """Return a run of BASE with further settings, shared by all keys."""
    tried: dict[str, Tried] = {}

    def get(also: dict[str, Any]) -> Tried:
        return tried.setdefault(repr(also), Tried(config_of(folder, also), folder / f"run-{len(tried)}"))

    return get


@pytest.mark.parametrize("key", ROWS)
def test_key(key: str, folder: Path, tmp_path: Path, unchanged: Callable[[dict[str, Any]], Tried]) -> None:
    row = ROWS[key]
    value = folder / row.value if isinstance(row.value, Path) else row.value
    if key == "data.tokenizer_path":
        made = Tried(config_of(folder, {"data.tokenizer_vocab_size": 270}), tmp_path).data()
        value = Path(str(made.tokenizer_path))
    also = dict(row.also) | ({"bert.num_token_types": 2} if key.startswith("bert.") else {})
    before, after = row.seen(unchanged(also)), row.seen(Tried(config_of(folder, {**also, key: value}), tmp_path))
    if row.wanted is CHANGED:
        wanted = before if isinstance(before, dict) else {"": before}
        found = after if isinstance(after, dict) else {"": after}
        # A seed must change every entry of a dict; any other key at least one.
        differs = [wanted.get(name) != found.get(name) for name in {*wanted, *found}]
        assert all(differs) if key == "training.seed" else any(differs)
    else:
        assert after == pytest.approx(row.wanted) if isinstance(row.wanted, float) else after == row.wanted
        assert before != after


def test_lines_and_folders(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_megatron.config.config_file import with_run_folder  # noqa: PLC0415 - this test only

    for interval, lines in ((2, ["step 2/4", "step 4/4"]), (3, ["step 3/4", "step 4/4"])):
        Tried(config_of(folder, {"training.log_interval": interval}), tmp_path / f"{interval}").trained()
        printed = capsys.readouterr().out.splitlines()
        assert [line.split("  ")[0] for line in printed if line.startswith("step") and "loss " in line[:18]] == lines
    for given, wanted in (({"training.run_folder": "some/where"}, "some/where"), ({}, "runs/my")):
        assert with_run_folder(config_of(folder, given), Path("my.toml")).training.run_folder == wanted
    monkeypatch.setitem(sys.modules, "wandb", None)  # tests/training/test_trackers.py has the trackers themselves
    for key, value, needs in (("trackers", ("wandb",), 'wandb: pip install "wandb'), ("cuda_graphs", "block", "a GPU")):
        with pytest.raises(InputError, match=rf"training\.{key}.* needs {needs}"):
            train(config_of(folder, {f"training.{key}": value}), tmp_path / "run")
    for weights, counts in ((None, [20, 20]), ((1.0, 9.0), [4, 36])):
        both = {"data.path": (str(folder / "text"), str(folder / "other")), "data.weights": weights}
        assert Tried(config_of(folder, both), tmp_path).data().training.order.counts(40) == counts
    pytest.importorskip("tensorboard")
    Tried(config_of(folder, {"training.tensorboard": True}), tmp_path / "board").trained()
    assert list((tmp_path / "board" / "run" / "tensorboard").iterdir())
