"""Import of a Hugging Face folder: into a run folder, or into the shards of a model, one tensor at a time."""

import dataclasses
import functools
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from fused_megatron.checkpoint import StreamedBox, TensorBox, save_checkpoint
from fused_megatron.checkpoint.errors import SharedCheckpointError
from fused_megatron.checkpoint.model_state import parameter_boxes
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import check
from fused_megatron.collectives.together import run_on_first, run_together
from fused_megatron.config import DataConfig, OptimizerConfig, TrainConfig, TrainingConfig, TransformerConfig
from fused_megatron.durable import replace_file
from fused_megatron.hugging_face.known_families import family_of
from fused_megatron.hugging_face.leftovers import write_leftovers
from fused_megatron.hugging_face.settings import Settings
from fused_megatron.hugging_face.source import CONFIG_FILE, TRAINED_DTYPES, Source, open_source
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models import StageSpan, TransformerStack, cut_stages, new_model
from fused_megatron.weight_files import read_json

# Small files beside the weights; they are kept in the run, so that an export has them too.
KEPT_FILES = (
    CONFIG_FILE, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
)  # fmt: skip


def load_model(
    folder: str | os.PathLike[str],
    *,
    tp_group: dist.ProcessGroup | None = None,
    ep_group: dist.ProcessGroup | None = None,
    etp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    stage: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    skip: Sequence[str] = (),
) -> TransformerStack:
    """Load a GPT or BERT, or one pipeline stage of it, from a Hugging Face folder, into any layout of its ranks.

    Args:
        folder: holds config.json and one or several safetensors files.
        tp_group: tensor-parallel group; None means one rank.
        ep_group, etp_group: the ranks that share the experts, and each expert (mesh["ep"].group, mesh["etp"].group);
            None means one rank.
        sequence_parallel: as in GPT.
        stage: (index, number of stages) of the only pipeline stage to load, as cut_stages cuts it; None: all layers.
        dtype: dtype of the model; None keeps the dtype of the files.
        device: device of the model; None means the CPU.
        skip: glob patterns of tensors to leave out.

    Returns:
        The model, filled with this rank's shards.

    Raises:
        InputError: on every rank: open_source refuses the folder, or a size does not divide by the ranks.

    Communication: one exchange of JSON over each group.
    Memory: this rank's shards, and a block of a few MB.
    """
    built: list[TransformerStack] = []

    def build() -> None:
        source = open_source(Path(folder), dtype, skip)
        span: StageSpan | None = None
        if stage is not None:
            index, count = stage
            check(
                0 <= index < count, f"stage={stage} must be (index, number of stages) with index from 0 to {count - 1}"
            )
            span = cut_stages(source.config, count)[index]
        layout = ParallelLayout(tp_group, sequence_parallel, ep_group=ep_group, etp_group=etp_group)
        model = new_model(source.config, layout=layout, stage=span, dtype=source.dtype, device=torch.device("meta"))
        built.append(_filled(model, source, device or torch.device("cpu")))

    run: Callable[[], object] = build
    for group in (tp_group, ep_group, etp_group):
        run = functools.partial(run_together, group, run, SharedCheckpointError)
    run()
    return built[0]


def _filled(model: TransformerStack, source: Source, device: torch.device) -> TransformerStack:
    model = model.to_empty(device=device)
    model.reset_dropout(seed=0)
    for parameter in model.parameters():
        parameter.data.zero_()  # rows of vocabulary padding stay zero
    for name, box in parameter_boxes(dict(model.named_parameters())).items():
        source.fill(name.removeprefix("model."), box.tensor, box.offset)
    return model


def import_model(
    folder: Path,
    run_path: Path,
    *,
    dtype: torch.dtype | None,
    skip: Sequence[str],
    group: dist.ProcessGroup | None,
    start: Callable[[TrainConfig], TrainConfig] | None = None,
) -> Source:
    """Make a run folder from a Hugging Face folder: a config, and a checkpoint of step 0 that holds only weights.

    Args:
        folder: holds config.json and safetensors files.
        run_path: run folder to create; it must not exist.
        dtype: float32 or bfloat16; None keeps the dtype of the files.
        skip: glob patterns of tensors to leave out.
        group: all ranks, which share the work; None: there is one rank.
        start: returns the config to write, with which training starts, given one with the full length of the model;
            called on rank 0. None: the full length.

    Returns:
        The opened Hugging Face folder.

    Raises:
        InputError: on every rank: open_source refuses the folder, or run_path cannot be created.
        CheckpointError: on every rank: writing failed. In either case no file is left behind.

    Communication: as save_checkpoint.
    Memory: one full tensor.
    """
    opened: list[Source] = []

    def prepare() -> None:
        check_absent(run_path)
        if (folder / RunFolder(run_path).tokenizer.name).is_file():
            read_json(folder / RunFolder(run_path).tokenizer.name)
        opened.append(open_source(folder, dtype, skip, for_run=True))

    run_together(group, prepare, SharedCheckpointError)
    source = opened[0]
    boxes: dict[str, TensorBox] = {}
    for name in source.rules:
        like = torch.empty(source.full_shape(name), dtype=source.dtype, device="meta")
        read = functools.partial(source.read, name)
        boxes[f"model.{name}"] = StreamedBox(like, tuple(like.shape), (0,) * like.dim(), read)
    config = _run_config(source, folder, run_path)
    state = {
        "progress": {"step": 0, "samples_consumed": 0},
        "vocab_size": source.config.vocab_size,
        "config": dataclasses.asdict(config),
        "weights_only": True,
    }
    with new_folder(run_path, group) as temporary:
        run = RunFolder(temporary)
        run_on_first(group, run.create, SharedCheckpointError)
        save_checkpoint(run.checkpoints, 0, boxes, state=state, group=group)
        run_on_first(
            group,
            lambda: _describe_run(run, config if start is None else start(config), folder, source, dtype),
            SharedCheckpointError,
        )
    return source


def _run_config(source: Source, folder: Path, run_path: Path) -> TrainConfig:
    """Return a config that continues training from the weights, with a small learning rate, in the run's folder."""
    tokenizer = run_path.absolute() / RunFolder(run_path).tokenizer.name
    return TrainConfig(
        model=source.config,
        data=DataConfig(tokenizer_path=str(tokenizer) if (folder / tokenizer.name).is_file() else None),
        optimizer=OptimizerConfig(lr=2e-5, min_lr=2e-6),
        training=TrainingConfig(
            dtype=TRAINED_DTYPES[source.dtype],
            run_folder=str(run_path.absolute()),
            global_batch_size=8,
            microbatch_size=1,
        ),
    )


def _describe_run(run: RunFolder, config: TrainConfig, folder: Path, source: Source, dtype: torch.dtype | None) -> None:
    tokenizer = folder / run.tokenizer.name
    run.describe(config, str(tokenizer) if tokenizer.is_file() else None)
    if config.model.seq_len != source.config.seq_len:
        line = f"seq_len = {config.model.seq_len}"
        full = f"{line}  # full length of the model: {source.config.seq_len}"
        replace_file(run.config, run.config.read_text("utf-8").replace(f"\n{line}\n", f"\n{full}\n", 1).encode())
    copy_kept_files(folder, run.hugging_face)
    write_leftovers(source, run.hugging_face, dtype)


def imported_config(run: RunFolder) -> TransformerConfig | None:
    """Return the config of the model that a run was imported from, with its full length; None: it was not imported.

    Raises:
        InputError: its config.json is damaged.
    """
    path = run.hugging_face / CONFIG_FILE
    if not path.is_file():
        return None
    settings = Settings(read_json(path), str(path))
    return family_of(settings).read_config(settings).trainable()


def copy_kept_files(source: Path, target: Path) -> None:
    """Copy those files of KEPT_FILES that exist."""
    target.mkdir(exist_ok=True)
    for name in KEPT_FILES:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def check_absent(target: Path) -> None:
    """Raise if target exists, or if it cannot be created."""
    check(not target.exists(), f"{target} exists already: choose another name, or remove it first")
    parent = target.absolute().parent
    check(
        not parent.exists() or (parent.is_dir() and os.access(parent, os.W_OK)),
        f"{target} cannot be made: {parent} cannot be written (choose another place)",
    )


@contextmanager
def new_folder(target: Path, group: dist.ProcessGroup | None) -> Iterator[Path]:
    """Yield a temporary folder. It is renamed to `target` when the block succeeds, and removed when it fails."""
    temporary = target.with_name(run_on_first(group, lambda: _make_temporary(target), SharedCheckpointError))
    try:
        yield temporary
        run_on_first(group, lambda: os.rename(temporary, target), SharedCheckpointError)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _make_temporary(target: Path) -> str:
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.iterdir():
        if re.fullmatch(re.escape(target.name) + r"\.tmp-[0-9a-f]{8}", left.name):
            shutil.rmtree(left, ignore_errors=True)  # a killed process left it
    temporary = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
    temporary.mkdir()
    return temporary.name
