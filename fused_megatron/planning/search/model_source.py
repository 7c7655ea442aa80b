"""The model and the batch that are planned: from a config, a preset, or the config.json of transformers."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_megatron.checks import InputError, check
from fused_megatron.config import DataConfig, OptimizerConfig, TrainConfig, TrainingConfig, TransformerConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.hugging_face.known_families import family_of
from fused_megatron.hugging_face.settings import Settings
from fused_megatron.planning.amounts import round_to_even_share
from fused_megatron.planning.command_line import vocabulary_note, with_vocabulary
from fused_megatron.untrusted_files import read_json

CONFIG_FILE = "config.json"
PRESETS = Path(__file__).parents[3] / "benchmarks" / "presets"
"""Folder of the presets, which only a source checkout has."""
DEFAULT_BATCH_TOKENS = 4 << 20
"""Tokens of a step for a model without a batch."""
LONGEST_DEFAULT = 8192
"""Tokens of a sequence for a model of transformers, unless its longest sequence is shorter."""


@dataclass(frozen=True)
class Workload:
    """A model and its batch, without a layout.

    Attributes:
        name: of the model, for messages and files.
        config: model, data, optimizer and training; its parallel section is not used.
        notes: choices that the user did not make, as text.
    """

    name: str
    config: TrainConfig
    notes: tuple[str, ...]

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self.config.training.global_batch_size * self.config.model.seq_len


def read_workload(
    source: str,
    overrides: Sequence[str] = (),
    *,
    num_gpus: int,
    seq_len: int | None = None,
    batch_tokens: int | None = None,
    dtype: str = "bfloat16",
) -> Workload:
    """Read the model, and set its batch.

    Args:
        source: path of one of our configs, of a folder of transformers or its config.json, or the name of a preset.
        overrides: options of a config, such as --model.num_layers 10.
        num_gpus: a rounded batch is a multiple of what many layouts of this number of GPUs divide.
        seq_len: tokens of a sequence; None: the config's, or the model's longest up to LONGEST_DEFAULT.
        batch_tokens: tokens of a step, rounded to whole sequences; None: the config's, or DEFAULT_BATCH_TOKENS.
        dtype: dtype of a model of transformers; our configs have their own.

    Raises:
        InputError: there is no such model, or it cannot be read or trained; the batch is below one sequence.
    """
    path = Path(source)
    folder = path.parent if path.name == CONFIG_FILE else path
    if path.suffix == ".toml":
        config, name = load_config(path, overrides), path.stem
    elif (folder / CONFIG_FILE).is_file():
        check(not overrides, f"{' '.join(overrides):.60} needs one of our configs: {source} is of transformers")
        config, name = _from_transformers(folder, dtype), folder.resolve().name
    else:
        preset = _preset(source)
        config, name = load_config(preset, overrides), preset.stem
    config.model.check_trainable()
    own_batch = None if path.suffix != ".toml" and (folder / CONFIG_FILE).is_file() else config
    return _with_batch(name, config, own_batch, num_gpus, seq_len, batch_tokens)


def _preset(name: str) -> Path:
    """Return the preset whose name this is, or begins with it."""
    known = sorted(path.stem for path in PRESETS.glob("*.toml"))
    found = [each for each in known if each == name] or [each for each in known if name and each.startswith(name)]
    if len(found) == 1:
        return PRESETS / f"{found[0]}.toml"
    folder = Path(name)
    if folder.is_dir():
        raise InputError(f"model={name!r:.80} must be a folder with a {CONFIG_FILE} of transformers; it has none")
    presets = f"a preset's name ({', '.join(found or known)})" if known else "a preset's name in a checkout"
    raise InputError(
        f"model={name!r:.80} must be the path of a config (.toml), a folder with a {CONFIG_FILE} of transformers, or "
        f"{presets}"
    )


def _from_transformers(folder: Path, dtype: str) -> TrainConfig:
    """Return a config that trains the model of a folder from its initial weights."""
    path = folder / CONFIG_FILE
    settings = Settings(read_json(path), str(path))
    model = family_of(settings).read_config(settings).trainable()
    tokenizer = folder / "tokenizer.json"
    return TrainConfig(
        model=model,
        data=DataConfig(tokenizer_path=str(tokenizer.absolute()) if tokenizer.is_file() else None),
        optimizer=OptimizerConfig(lr=3e-4, min_lr=3e-5),
        training=TrainingConfig(dtype=dtype, global_batch_size=1, microbatch_size=1),
    )


def _with_batch(
    name: str,
    config: TrainConfig,
    own_batch: TrainConfig | None,
    num_gpus: int,
    seq_len: int | None,
    batch_tokens: int | None,
) -> Workload:
    """Set the sequence length and the batch; own_batch has the batch of the config, or is None."""
    notes = []
    if note := vocabulary_note(config):
        notes.append(note)
        config = with_vocabulary(config)
    model, length = config.model, seq_len
    if length is None:
        length = model.seq_len
        if own_batch is None:
            length = min(length, LONGEST_DEFAULT)
            notes.append(f"sequences of {length:,} tokens (--seq-len)")
    sequences = None
    if own_batch is not None and batch_tokens is None:
        tokens = own_batch.training.global_batch_size * own_batch.model.seq_len
        if length == own_batch.model.seq_len:
            sequences = own_batch.training.global_batch_size
    else:
        tokens = batch_tokens or DEFAULT_BATCH_TOKENS
        if batch_tokens is None:
            notes.append(f"{tokens:,} tokens a step (--batch-tokens)")
    check(tokens >= length, f"batch_tokens={tokens} must be at least one sequence of seq_len={length} tokens")
    if sequences is None:
        sequences = round_to_even_share(tokens / length, num_gpus)
        if sequences * length != tokens:
            notes.append(f"{sequences * length:,} tokens a step in place of {tokens:,}: {sequences:,} whole sequences")
    training = dataclasses.replace(config.training, global_batch_size=sequences, microbatch_size=1)
    changed = dataclasses.replace(config, model=_without_recomputation(model, length), training=training)
    return Workload(name, changed, tuple(notes))


def _without_recomputation(model: TransformerConfig, seq_len: int) -> TransformerConfig:
    return dataclasses.replace(model, seq_len=seq_len, recompute="none", recompute_blocks=None)
