"""Preparation of training data: text is found, divided, tokenized and cached; indexed datasets are checked."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from fused_megatron.checks import InputError, check
from fused_megatron.data.blend import BlendedValidation
from fused_megatron.data.build_once import build_once, default_cache_folder
from fused_megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, dataset_files, sync, token_dtype
from fused_megatron.data.sample_index import too_few_tokens
from fused_megatron.data.text_source import TextSource, path_source, standard_library_source
from fused_megatron.data.token_dataset import TokenDataset, ValidationDataset, held_out, split_documents
from fused_megatron.data.token_digest import (
    SMALL_BYTES,
    TokenDigest,
    check_small,
    digest_path,
    read_digest,
    spread_digest,
)
from fused_megatron.data.tokenizer import END_OF_DOCUMENT, Tokenizer, load_tokenizer, text_pieces, train_tokenizer
from fused_megatron.untrusted_files import MOST_JSON_BYTES, Size, open_plain_file, parse_json, read_bounded

Progress = Callable[[str, int, int], None]
_T = TypeVar("_T")

# Part of every cache key: raise it when the same input is prepared differently.
_FORMAT_VERSION = 1
# More text hardly changes the merges, and training on all of the default text would take three times as long.
_TOKENIZER_TRAINING_BYTES = 10_000_000
_TOKENIZER_PIECE_CHARACTERS = 1 << 16
# Text to encode at once: enough to keep all cores busy, and few enough to keep the encodings small.
_ENCODE_CHARACTERS = 1 << 21
_SCAN_TOKENS = 1 << 24
_READ_BYTES = 1 << 20


class _Ids(msgspec.Struct):
    """The cached manifest of an indexed dataset."""

    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]


class _Text(_Ids):
    """The cached manifest of prepared text."""

    description: str
    train_tokens: Size
    validation_tokens: Size
    validation_fraction: float
    fingerprint: str
    skipped_files: tuple[str, ...]


@dataclass(frozen=True)
class PreparedCorpus:
    """Token datasets ready for training, and their origin.

    Attributes:
        description: name of the text, for messages.
        train_prefix: prefix of the indexed dataset with the training tokens.
        validation_prefix: prefix of the indexed dataset with the held-out tokens. It equals train_prefix for the user's
            own indexed dataset, whose documents are divided; train_dataset and validation_dataset do that.
        tokenizer_path: the tokenizer's JSON file; None for an indexed dataset without one.
        vocab_size: number of token ids.
        train_tokens: number of training tokens.
        validation_tokens: number of held-out tokens.
        validation_fraction: share of the documents that is held out.
        fingerprint: hash of the tokens (for an indexed dataset, of its index). Equal hashes mean equal data.
        skipped_files: files of the standard library that are left out because they are not UTF-8.
        vocabulary: origin of vocab_size, for messages.
    """

    description: str
    train_prefix: str
    validation_prefix: str
    tokenizer_path: str | None
    vocab_size: int
    train_tokens: int
    validation_tokens: int
    validation_fraction: float
    fingerprint: str
    skipped_files: tuple[str, ...] = ()
    vocabulary: str = "the tokenizer"

    def train_dataset(self, seq_len: int, seed: int) -> TokenDataset:
        """Return the training samples; every batch is checked against vocab_size."""
        dataset = IndexedDataset(self.train_prefix)
        documents = None
        if self.train_prefix == self.validation_prefix:
            documents = split_documents(dataset, self.validation_fraction)[0]
        tokens = dataset.total_tokens if documents is None else documents.total_tokens
        check(tokens > seq_len, f"{self.description}: {too_few_tokens(tokens, seq_len)}")
        return TokenDataset(dataset, seq_len, seed, documents=documents, vocab_size=self.vocab_size)

    def validation_dataset(self, seq_len: int, max_samples: int | None = None) -> ValidationDataset:
        """Return the held-out samples; every batch is checked against vocab_size."""
        dataset = IndexedDataset(self.validation_prefix)
        documents = None
        if self.train_prefix == self.validation_prefix:
            documents = split_documents(dataset, self.validation_fraction)[1]
        return ValidationDataset(
            dataset, seq_len, documents=documents, vocab_size=self.vocab_size, max_samples=max_samples
        )

    def whole_dataset(self, seq_len: int, max_samples: int | None = None) -> ValidationDataset | BlendedValidation:
        """Return samples of all documents in order, as validation_dataset."""
        prefixes = sorted({self.train_prefix, self.validation_prefix})
        datasets = [each for each in map(IndexedDataset, prefixes) if each.total_tokens > 1]
        total = sum(each.total_tokens for each in datasets)
        samples = [
            ValidationDataset(
                each,
                seq_len,
                vocab_size=self.vocab_size,
                max_samples=None if max_samples is None else max(1, max_samples * each.total_tokens // total),
            )
            for each in datasets
        ]
        check(bool(samples), f"{self.description}: two tokens are needed to evaluate")
        return samples[0] if len(samples) == 1 else BlendedValidation(samples)

    def content(self) -> dict[str, str]:
        """Return hashes of the tokens with their index, and of the tokenizer, to find ranks that read other data.

        Raises:
            InputError: a file cannot be read.
        """
        tokens = spread_digest(sorted({self.train_prefix, self.validation_prefix}))
        tokenizer = "" if self.tokenizer_path is None else file_digest(self.tokenizer_path)
        return {"tokens": f"{self.fingerprint} {tokens}", "tokenizer": tokenizer}

    def large_files(self) -> list[tuple[str, TokenDigest]]:
        """Return prefix and checksums of each file that is too large to be checked when it is opened."""
        digests = {prefix: read_digest(prefix) for prefix in sorted({self.train_prefix, self.validation_prefix})}
        return [(p, digest) for p, digest in digests.items() if digest is not None and digest.num_bytes > SMALL_BYTES]

    @property
    def tokens_path(self) -> str:
        """The file of the training tokens, for messages."""
        return f"{self.train_prefix}.bin"

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that made the tokens; None if it is unknown."""
        return None if self.tokenizer_path is None else load_tokenizer(self.tokenizer_path)


def prepare_corpus(
    path: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    tokenizer_vocab_size: int = 8192,
    validation_fraction: float = 0.05,
    *,
    tokenizer_path: str | os.PathLike[str] | None = None,
    special_tokens: Sequence[str] = (END_OF_DOCUMENT,),
    vocab_size: int | None = None,
    text_field: str = "text",
    on_progress: Progress | None = None,
) -> PreparedCorpus:
    """Prepare text or an indexed dataset for training. Prepared text is cached.

    Every rank may call this at the same time: one process per machine (or shared disk) works, the others wait.

    Validation gets whole documents, evenly spread over the input. If there are too few of them (fewer than
    1 / validation_fraction), validation gets the end of each document, cut between paragraphs or lines if possible.

    Args:
        path: a file that file_documents reads, a folder of such files, or an indexed dataset (its prefix, or one of its
            two files). None takes the Python standard library's sources on this machine.
        cache_dir: folder of the cache; None for $XDG_CACHE_HOME/fused_megatron or ~/.cache/fused_megatron.
        tokenizer_vocab_size: vocabulary entries of the tokenizer that is trained on the text.
        validation_fraction: share of the documents to hold out, in (0, 0.5].
        tokenizer_path: tokenizer to use instead of training one; for an indexed dataset, the tokenizer that made it.
        special_tokens: special tokens of a tokenizer that is trained.
        vocab_size: vocabulary size of an indexed dataset. None: the tokenizer's; else the one in its digest; else its
            largest token id plus one.
        text_field: field of a line of .jsonl, or column of a table, that holds the text.
        on_progress: called with (description of the work, done, total); total is 0 if it is unknown.

    Raises:
        InputError: the data does not exist or is damaged, or the cache cannot be written; one line each.
    """
    check(0 < validation_fraction <= 0.5, f"validation_fraction={validation_fraction} must be above 0 and at most 0.5")
    cache = default_cache_folder() if cache_dir is None else Path(cache_dir).expanduser()
    report: Progress = on_progress or (lambda stage, done, total: None)
    prefix = None if path is None else indexed_prefix(path)
    if prefix is not None:
        return _prepare_indexed(prefix, cache, validation_fraction, tokenizer_path, vocab_size, report)
    check(vocab_size is None, "vocab_size is for indexed datasets; text takes tokenizer_vocab_size")
    source = standard_library_source() if path is None else path_source(path, text_field)
    root = None if path is None else str(Path(path).expanduser().resolve())
    tokenizer: Any = tokenizer_vocab_size if tokenizer_path is None else file_digest(tokenizer_path)
    if tokenizer_path is None and tuple(special_tokens) != (END_OF_DOCUMENT,):
        tokenizer = [tokenizer_vocab_size, *special_tokens]
    try:
        field = [] if text_field == "text" else [text_field]
        key = cache_key(["text", root, source.fingerprint(), tokenizer, validation_fraction, *field])
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error

    def own_tokenizer(path: Path) -> Tokenizer:
        if tokenizer_path is None:
            report("training the tokenizer", 0, 0)
            texts = tokenizer_texts(source, validation_fraction, source.total_bytes())
            return train_tokenizer(texts, tokenizer_vocab_size, path, special_tokens)
        path.write_bytes(Path(tokenizer_path).read_bytes())
        return load_tokenizer(tokenizer_path)

    def build(folder: Path) -> None:
        _build_text(source, folder, own_tokenizer(folder / "tokenizer.json"), validation_fraction, report)

    def on_wait() -> None:
        report("waiting for another process that prepares the text", 0, 0)

    return build_once(cache, f"text-{key}", build, _load_text, on_wait)


def indexed_prefix(path: str | os.PathLike[str]) -> str | None:
    """Return the prefix if path names an indexed dataset, else None."""
    expanded = Path(path).expanduser()
    if expanded.suffix in (".bin", ".idx"):
        return str(expanded.with_suffix(""))
    if not expanded.exists() and any(file.exists() for file in dataset_files(expanded)):
        return str(expanded)
    return None


def _prepare_indexed(
    prefix: str,
    cache: Path,
    validation_fraction: float,
    tokenizer_path: str | os.PathLike[str] | None,
    vocab_size: int | None,
    report: Progress,
) -> PreparedCorpus:
    dataset = IndexedDataset(prefix)
    check(dataset.total_tokens > 0, f"{prefix}.bin: there are no tokens in it")
    check_small(prefix, dataset.digest)
    train, validation = split_documents(dataset, validation_fraction)
    vocabulary = "vocab_size"
    if vocab_size is None and tokenizer_path is not None:
        vocab_size = load_tokenizer(tokenizer_path).vocab_size
        vocabulary = os.fspath(tokenizer_path)
    if vocab_size is None and dataset.digest is not None:
        vocab_size = dataset.digest.vocab_size
        vocabulary = f"{digest_path(prefix)}"
    index_path = dataset_files(prefix)[1]
    if vocab_size is None:
        stats = [file.stat() for file in dataset_files(prefix)]
        key = cache_key(["ids", os.path.abspath(prefix), [(stat.st_size, stat.st_mtime_ns) for stat in stats]])

        def build(folder: Path) -> None:
            _write_json(folder / "manifest.json", {"vocab_size": _largest_id(dataset, report) + 1})

        ids = build_once(cache, f"ids-{key}", build, lambda folder: _read_json(folder / "manifest.json", _Ids))
        vocab_size = ids.vocab_size
        vocabulary = f"the largest token id in {prefix}.bin"
    return PreparedCorpus(
        description=prefix,
        train_prefix=prefix,
        validation_prefix=prefix,
        tokenizer_path=None if tokenizer_path is None else os.fspath(tokenizer_path),
        vocab_size=vocab_size,
        train_tokens=train.total_tokens,
        validation_tokens=validation.total_tokens,
        validation_fraction=validation_fraction,
        fingerprint=file_digest(index_path),
        vocabulary=vocabulary,
    )


def _largest_id(dataset: IndexedDataset, report: Progress) -> int:
    largest = 0
    for start in range(0, dataset.total_tokens, _SCAN_TOKENS):
        report("looking for the largest token id", start, dataset.total_tokens)
        block = dataset.tokens(start, min(start + _SCAN_TOKENS, dataset.total_tokens))
        check(int(block.min()) >= 0, f"{dataset.path_prefix}.bin: negative token id {block.min()}: the data is damaged")
        largest = max(largest, int(block.max()))
    return largest


def _divided(source: TextSource, validation_fraction: float) -> Iterator[tuple[bool, str]]:
    """Yield (held out, text) of every document; of two parts of every document if there are few."""
    few = True
    for index, _ in enumerate(source.documents()):
        if held_out(index, validation_fraction):
            few = False
            break
    for index, text in enumerate(source.documents()):
        if few:
            end = _cut(text, validation_fraction)
            yield False, text[:end]
            yield True, text[end:]
        else:
            yield held_out(index, validation_fraction), text


def _cut(text: str, fraction: float) -> int:
    """Return where the last `fraction` of the text begins: near an empty line, line end or space, if possible."""
    target = math.ceil(len(text) * (1 - fraction))
    for separator in ("\n\n", "\n", " "):
        found = text.rfind(separator, max(0, target - math.ceil(len(text) * fraction)), target)
        if found >= 0:
            return found + len(separator)
    return target


def tokenizer_texts(source: TextSource, validation_fraction: float, total_bytes: int) -> Iterator[str]:
    """Yield evenly spread pieces of the training documents, from which a tokenizer is trained.

    Args:
        source: the documents.
        validation_fraction: share of the documents that is left out.
        total_bytes: of all sources of the tokenizer, which decide how many pieces are enough.
    """
    stride = math.ceil(total_bytes / _TOKENIZER_TRAINING_BYTES)
    count = 0
    for is_validation, text in _divided(source, validation_fraction):
        if not is_validation:
            for piece in text_pieces(text, _TOKENIZER_PIECE_CHARACTERS):
                if count % stride == 0:
                    yield piece
                count += 1


def _build_text(
    source: TextSource,
    folder: Path,
    tokenizer: Tokenizer,
    validation_fraction: float,
    report: Progress,
) -> None:
    """Write the training and validation datasets to the folder, and manifest.json last."""
    fingerprint = hashlib.sha256()
    tokens = [0, 0]
    dtype = token_dtype(tokenizer.vocab_size)
    with (
        IndexedDatasetWriter(folder / "train", dtype, vocab_size=tokenizer.vocab_size) as train,
        IndexedDatasetWriter(folder / "validation", dtype, vocab_size=tokenizer.vocab_size) as validation,
    ):
        for is_validation, ids in _encoded(source, tokenizer, dtype, validation_fraction, report):
            (validation if is_validation else train).add_document(ids)
            tokens[is_validation] += len(ids)
            fingerprint.update(b"%d %d\n" % (is_validation, len(ids)))
            fingerprint.update(ids.data)
    check(tokens[0] > 0, f"{source.description}: there is no text in it")
    manifest = {
        "description": source.description,
        "vocab_size": tokenizer.vocab_size,
        "train_tokens": tokens[0],
        "validation_tokens": tokens[1],
        "validation_fraction": validation_fraction,
        "fingerprint": fingerprint.hexdigest(),
        "skipped_files": sorted(source.skipped),
    }
    _write_json(folder / "manifest.json", manifest)


def _encoded(
    source: TextSource, tokenizer: Tokenizer, dtype: np.dtype, validation_fraction: float, report: Progress
) -> Iterator[tuple[bool, np.ndarray]]:
    """Yield (held out, tokens of a dtype with an end of document) of every text that is not empty."""
    total_bytes = source.total_bytes()
    done = 0
    waiting: list[tuple[bool, str]] = []

    def encode() -> Iterator[tuple[bool, np.ndarray]]:
        nonlocal done
        batch = tokenizer.encode_batch([text for _, text in waiting], dtype)
        for (is_validation, _), ids in zip(waiting, batch, strict=True):
            for start in range(0, len(ids), _SCAN_TOKENS):
                done += int(tokenizer.token_bytes[ids[start : start + _SCAN_TOKENS]].sum())
            yield is_validation, np.append(ids, dtype.type(tokenizer.end_of_document))
        waiting.clear()
        report("tokenizing", min(done, total_bytes), total_bytes)

    for is_validation, text in _divided(source, validation_fraction):
        if text:
            waiting.append((is_validation, text))
        if sum(len(text) for _, text in waiting) >= _ENCODE_CHARACTERS:
            yield from encode()
    yield from encode()


def _load_text(folder: Path) -> PreparedCorpus | None:
    manifest = _read_json(folder / "manifest.json", _Text)
    if manifest is None:
        return None
    prefixes = {name: str(folder / name) for name in ("train", "validation")}
    try:
        for prefix in prefixes.values():
            check_small(prefix, IndexedDataset(prefix).digest)
        load_tokenizer(folder / "tokenizer.json")
    except InputError as error:
        if isinstance(error.__cause__, OSError):  # a file that cannot be read now is not damaged
            raise
        warnings.warn(f"fused_megatron: cached data is damaged and built again: {error}", RuntimeWarning, stacklevel=2)
        return None
    return PreparedCorpus(
        train_prefix=prefixes["train"],
        validation_prefix=prefixes["validation"],
        tokenizer_path=str(folder / "tokenizer.json"),
        **msgspec.structs.asdict(manifest),
    )


def cache_key(content: list[Any]) -> str:
    """Return a name for a cache folder that differs if anything in the content differs."""
    return hashlib.sha256(json.dumps([_FORMAT_VERSION, *content]).encode()).hexdigest()[:24]


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file; InputError if it cannot be read."""
    try:
        found = hashlib.sha256()
        with open(open_plain_file(Path(path)), "rb") as file:
            while block := file.read(_READ_BYTES):
                found.update(block)
        return found.hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _read_json(path: Path, schema: type[_T]) -> _T | None:
    """Read the file; None if it is missing or damaged."""
    try:
        return parse_json(read_bounded(path, MOST_JSON_BYTES), schema)
    except (FileNotFoundError, NotADirectoryError, InputError):
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        file.write(json.dumps(content, indent=1).encode())
        sync(file)
