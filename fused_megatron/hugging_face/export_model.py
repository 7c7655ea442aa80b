"""Export of a run's newest checkpoint to a Hugging Face folder, one tensor at a time."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fused_megatron.checkpoint import CheckpointError, Manifest, newest_checkpoint, read_manifest, read_tensor
from fused_megatron.checkpoint.errors import SharedCheckpointError, explain_os_error
from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checkpoint.run_state import run_state
from fused_megatron.checkpoint.shard_file import Entry, write_shard_file
from fused_megatron.checks import InputError, dtype_name
from fused_megatron.collectives.together import run_on_first, run_together
from fused_megatron.config import TransformerConfig, model_config
from fused_megatron.data.tokenizer import load_tokenizer
from fused_megatron.hugging_face.family_description import Family
from fused_megatron.hugging_face.import_model import check_absent, copy_kept_files, new_folder
from fused_megatron.hugging_face.known_families import differing_fields, family_for
from fused_megatron.hugging_face.leftovers import Leftovers, StreamedTensors, kept_tensors, read_leftovers
from fused_megatron.hugging_face.rules import Rule
from fused_megatron.hugging_face.settings import Settings
from fused_megatron.hugging_face.source import CONFIG_FILE
from fused_megatron.hugging_face.tokenizer_files import special_ids, write_tokenizer_files
from fused_megatron.weight_files import INDEX_FILE, SINGLE_FILE, read_json

# How each tensor of a file is made.
_Makers = Mapping[Entry, Callable[[], torch.Tensor]]


def export_model(
    run_path: Path,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    max_file_bytes: float,
    group: dist.ProcessGroup | None,
) -> str:
    """Write the newest checkpoint of a run as config.json and safetensors files (with an index if there are several).

    Args:
        run_path: run folder, written by any number of ranks.
        folder: folder to create; it must not exist.
        dtype: dtype of the tensors; None keeps the dtype of the run.
        max_file_bytes: most bytes of a file; a larger tensor gets a file of its own.
        group: all ranks; only the first works. None: there is one rank.

    Returns:
        The transformers class that loads the folder.

    Raises:
        InputError: on every rank: no run folder, no valid checkpoint, or a model that no Hugging Face family has.
        CheckpointError: on every rank: the checkpoint is damaged, or writing failed. No file is left behind.

    Communication: small exchanges between all ranks; no tensors.
    Memory: one full tensor (two for a fused query, key and value).
    """
    run = RunFolder(run_path)

    def prepare() -> None:
        run.check_exists()
        check_absent(folder)

    run_together(group, prepare, SharedCheckpointError)
    newest = newest_checkpoint(run.checkpoints, group=group)
    with new_folder(folder, group) as temporary:
        return str(
            run_on_first(group, lambda: _write(run, newest, temporary, dtype, max_file_bytes), SharedCheckpointError)
        )


def _require_checkpoint(checkpoint: Path | None, run: RunFolder) -> Path:
    if checkpoint is None:
        raise InputError(f"{run.checkpoints} holds no checkpoint that verifies (train first)")
    return checkpoint


def _model_of(checkpoint: Path, manifest: Manifest) -> TransformerConfig:
    state = run_state(checkpoint, manifest)
    try:
        return model_config(state["config"]["model"] | {"vocab_size": state["vocab_size"]})
    except InputError as error:
        raise InputError(f"{checkpoint}: config.model of its state: {error}") from None


def _write(run: RunFolder, newest: Path | None, folder: Path, dtype: torch.dtype | None, max_bytes: float) -> str:
    checkpoint = _require_checkpoint(newest, run)
    manifest = read_manifest(checkpoint)
    config = _model_of(checkpoint, manifest)
    original = run.hugging_face / CONFIG_FILE
    settings = read_json(original) if original.is_file() else {}
    family = family_for(config, settings.get("model_type"))
    left = read_leftovers(run.hugging_face) if settings.get("model_type") == family.model_type else Leftovers()
    prefix = family.prefix if left.prefix is None else left.prefix
    rules = [rule.with_names(left.renamed) for rule in family.rules(config, prefix)]
    entries = _entries(checkpoint, manifest, rules, left, dtype)
    files = _split_into_files(entries, max_bytes)
    if run.hugging_face.is_dir():
        copy_kept_files(run.hugging_face, folder)
    tokenizer = load_tokenizer(run.tokenizer) if run.tokenizer.is_file() else None
    try:
        if tokenizer is not None:
            (folder / run.tokenizer.name).write_bytes(run.tokenizer.read_bytes())
            write_tokenizer_files(folder, tokenizer, config)
        for i, file in enumerate(files, 1):
            name = SINGLE_FILE if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
            write_shard_file(folder / name, StreamedTensors(file), manifest.step)
        if len(files) > 1:
            _write_index(folder, files)
        written = dict(_config_json(settings, family, config))
        if not settings:
            written |= special_ids(tokenizer).as_fields()
        stored = dtype_name(next(iter(entries)).dtype)  # the first entry is an embedding
        written["dtype" if "dtype" in written else "torch_dtype"] = stored
        (folder / CONFIG_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        reason = explain_os_error(error, folder.parent, sum(entry.num_bytes for entry in entries))
        raise CheckpointError(f"{folder} not written: {reason}") from error
    return str(written["architectures"][0])


def _entries(
    checkpoint: Path, manifest: Manifest, rules: Sequence[Rule], left: Leftovers, dtype: torch.dtype | None
) -> dict[Entry, Callable[[], torch.Tensor]]:
    """Return the tensors to write, and how each is made."""

    def make(rule: Rule, source: str) -> torch.Tensor:
        ours = read_tensor(checkpoint, manifest, f"model.{rule.name}")
        return rule.to_source(ours, source).to(dtype or ours.dtype)

    entries = {}
    for rule in rules:
        stored = manifest.tensors[f"model.{rule.name}"]
        for source in rule.sources:
            for name in (source, *(copy for copy, original in left.copies.items() if original == source)):
                entry = Entry(name, dtype or stored.dtype, rule.source_shape(stored.shape))
                entries[entry] = functools.partial(make, rule, source)
    return entries | (kept_tensors(left.files, dtype) if left.files else {})


def _split_into_files(entries: _Makers, max_bytes: float) -> list[dict[Entry, Callable[[], torch.Tensor]]]:
    """Distribute the entries, in order, to files of at most max_bytes."""
    files: list[dict[Entry, Callable[[], torch.Tensor]]] = [{}]
    size = 0
    for entry, make in entries.items():
        if files[-1] and size + entry.num_bytes > max_bytes:
            files.append({})
            size = 0
        files[-1][entry] = make
        size += entry.num_bytes
    return files


def _write_index(folder: Path, files: list[dict[Entry, Callable[[], torch.Tensor]]]) -> None:
    names = {
        entry.key: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, file in enumerate(files, 1) for entry in file
    }
    total = sum(entry.num_bytes for file in files for entry in file)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _config_json(original: dict[str, Any], family: Family, config: TransformerConfig) -> dict[str, Any]:
    """Return the config.json of the import if it still fits the model; else one with the model's own fields."""
    if original.get("model_type") == family.model_type:
        before = family.read_config(Settings(original, CONFIG_FILE)).trainable()
        # Training on shorter sequences than the model can read takes no positions away from it.
        shorter = config.position == "rotary" and config.seq_len < before.seq_len
        if not differing_fields(before, config) and (before.seq_len == config.seq_len or shorter):
            return original
        # The same class as at the import, since its untrained heads are written too.
        config_json = family.write_config(config) | {"architectures": [family.architecture_in(original)]}
    else:
        config_json = family.write_config(config)
    kept = {name: value for name, value in original.items() if name not in ("rope_parameters", "layer_types")}
    return kept | config_json
