"""Preparation of one text or of several with weights, which share a tokenizer."""

import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_megatron.checks import InputError
from fused_megatron.config import DataConfig
from fused_megatron.data.blend import BlendedDataset, BlendedValidation
from fused_megatron.data.build_once import build_once, default_cache_folder
from fused_megatron.data.corpus import (
    PreparedCorpus,
    Progress,
    cache_key,
    indexed_prefix,
    prepare_corpus,
    tokenizer_texts,
)
from fused_megatron.data.text_source import TextSource, path_source
from fused_megatron.data.token_digest import TokenDigest
from fused_megatron.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


@dataclass(frozen=True)
class BlendedCorpus:
    """Several corpora with weights; the interface of a PreparedCorpus.

    Attributes:
        parts: the corpora.
        weights: share of the samples of each.
        vocabulary: origin of vocab_size, for messages.
    """

    parts: Sequence[PreparedCorpus]
    weights: Sequence[float]
    vocabulary: str = "the largest of data.path"

    @property
    def description(self) -> str:
        """Name and share of each text, for messages."""
        shares = (weight / sum(self.weights) for weight in self.weights)
        named = zip(shares, self.parts, strict=True)
        return " + ".join(f"{share:.3g} {part.description}" for share, part in named)

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens, their order and the weights."""
        named = [(part.fingerprint, weight) for part, weight in zip(self.parts, self.weights, strict=True)]
        return hashlib.sha256(repr(named).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of token ids: enough for every part."""
        return max(part.vocab_size for part in self.parts)

    @property
    def tokenizer_path(self) -> str | None:
        """The tokenizer's JSON file; None for indexed datasets without one."""
        return self.parts[0].tokenizer_path

    def train_dataset(self, seq_len: int, seed: int) -> BlendedDataset:
        """As PreparedCorpus.train_dataset."""
        return BlendedDataset([part.train_dataset(seq_len, seed) for part in self.parts], self.weights)

    def validation_dataset(self, seq_len: int, max_samples: int | None = None) -> BlendedValidation:
        """As PreparedCorpus.validation_dataset; the weights divide max_samples, and each part has one at least."""
        return self._divided("validation_dataset", seq_len, max_samples)

    def whole_dataset(self, seq_len: int, max_samples: int | None = None) -> BlendedValidation:
        """As PreparedCorpus.whole_dataset."""
        return self._divided("whole_dataset", seq_len, max_samples)

    def _divided(self, what: str, seq_len: int, max_samples: int | None) -> BlendedValidation:
        parts = []
        for part, weight in zip(self.parts, self.weights, strict=True):
            share = None if max_samples is None else max(1, round(max_samples * weight / sum(self.weights)))
            parts.append(getattr(part, what)(seq_len, share))
        return BlendedValidation(parts)

    def content(self) -> dict[str, str]:
        """As PreparedCorpus.content."""
        contents = [part.content() for part in self.parts]
        return {name: " ".join(content[name] for content in contents) for name in contents[0]}

    def large_files(self) -> list[tuple[str, TokenDigest]]:
        """As PreparedCorpus.large_files."""
        return list(itertools.chain.from_iterable(part.large_files() for part in self.parts))

    @property
    def tokens_path(self) -> str:
        """The token files, for messages."""
        return " ".join(part.tokens_path for part in self.parts)

    def tokenizer(self) -> Tokenizer | None:
        """As PreparedCorpus.tokenizer."""
        return self.parts[0].tokenizer()


def prepare_data(
    config: DataConfig, special_tokens: Sequence[str], on_progress: Progress
) -> PreparedCorpus | BlendedCorpus:
    """Prepare the text of a config, one or several. Prepared text is cached.

    Several texts without a tokenizer share one that is trained on all of them. Without weights each text has the share
    of its tokens.

    Args:
        config: of the data.
        special_tokens: special tokens of a tokenizer that is trained.
        on_progress: as in prepare_corpus.

    Raises:
        InputError: as prepare_corpus; or text and indexed datasets stand together without data.tokenizer_path.
    """

    def prepare(path: str | None, tokenizer_path: str | None) -> PreparedCorpus:
        return prepare_corpus(
            path,
            config.cache_folder,
            config.tokenizer_vocab_size,
            config.validation_fraction,
            tokenizer_path=tokenizer_path,
            special_tokens=special_tokens,
            text_field=config.text_field,
            on_progress=on_progress,
        )

    paths = config.paths
    if len(paths) < 2:
        return prepare(paths[0] if paths else None, config.tokenizer_path)
    indexed = [path for path in paths if indexed_prefix(path) is not None]
    tokenizer_path = config.tokenizer_path
    if tokenizer_path is None and len(indexed) < len(paths):
        if indexed:
            raise InputError(
                f"data.path={indexed[0]} has token ids, and other paths have text: give data.tokenizer_path, the "
                f"tokenizer that made the ids"
            )
        tokenizer_path = _shared_tokenizer(config, special_tokens, on_progress)
    parts = [prepare(path, tokenizer_path) for path in paths]
    return BlendedCorpus(parts, config.weights or [float(part.train_tokens) for part in parts])


def _shared_tokenizer(config: DataConfig, special_tokens: Sequence[str], report: Progress) -> str:
    """Return the path of a tokenizer that is trained on all texts of the config."""
    sources = [path_source(path, config.text_field) for path in config.paths]
    size, fraction = config.tokenizer_vocab_size, config.validation_fraction
    cache = default_cache_folder() if config.cache_folder is None else Path(config.cache_folder).expanduser()

    def build(folder: Path) -> None:
        report("training the tokenizer", 0, 0)
        train_tokenizer(_all_texts(sources, fraction), size, folder / "tokenizer.json", special_tokens)

    def load(folder: Path) -> str | None:
        path = folder / "tokenizer.json"
        try:
            load_tokenizer(path)
        except InputError:
            return None
        return os.fspath(path)

    key = cache_key(["tokenizer", [each.fingerprint() for each in sources], size, fraction, *special_tokens])
    return build_once(cache, f"tokenizer-{key}", build, load)


def _all_texts(sources: Sequence[TextSource], validation_fraction: float) -> itertools.chain[str]:
    total_bytes = sum(source.total_bytes() for source in sources)
    return itertools.chain.from_iterable(tokenizer_texts(each, validation_fraction, total_bytes) for each in sources)
