"""Tokenizers (from the package tokenizers, stored as one JSON file), and training of a byte-level BPE."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fused_megatron.checks import InputError, check
from fused_megatron.durable import replace_file
from fused_megatron.optional_packages import install_command
from fused_megatron.untrusted_files import read_bounded

END_OF_DOCUMENT = "<|endoftext|>"
# Names of the end-of-document token in other tokenizers; the first one in the vocabulary is used.
_ENDS_OF_DOCUMENT = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
# Special tokens of a masked language model, as BERT names them; [SEP] ends documents.
MASKED_LM_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
# The 256 bytes and the end of document.
MIN_VOCAB_SIZE = 257
# Encoding takes some 100 bytes per token until a batch is done, so long documents are encoded in pieces, in batches
# that are large enough for all cores.
_PIECE_CHARACTERS = 1 << 20
_BATCH_CHARACTERS = 1 << 22
# The largest vocabularies have 250,000 entries in files of 40 MB. Tokenizer keeps a table of all ids.
_MOST_IDS = 1 << 24
_MOST_FILE_BYTES = 1 << 30
_TRIAL = "Some words, 3 of them: caf\u00e9.\n"


class Tokenizer:
    """Encoder of text to token ids, and decoder.

    A byte-level tokenizer is exact: decode(encode(text)) == text for every UTF-8 text. The string "<|endoftext|>" in a
    text is encoded like any other text, never as the special token.

    Attributes:
        vocab_size: number of token ids.
        end_of_document: id of "<|endoftext|>", or of its name in another tokenizer.
        token_bytes: int64 [vocab_size], number of UTF-8 bytes of each id (0 for special tokens). The sum over the
            tokens of a text is the length of the text in bytes.
        special_ids: special tokens, which no text encodes to, and their ids.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        # The JSON file does not keep this flag. Without it, a text could contain an end of document.
        self._backend.encode_special_tokens = True
        # Some tokenizers of models truncate or pad every text to the length of their training.
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document = vocabulary[next(end for end in _ENDS_OF_DOCUMENT if end in vocabulary)]
        special = {token.content for token in backend.get_added_tokens_decoder().values()}
        self.special_ids = {token: vocabulary[token] for token in special}
        self.token_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        byte_level = type(backend.decoder).__name__ == "ByteLevel"
        for token, index in vocabulary.items():
            self.token_bytes[index] = 0 if token in special else _num_bytes(token, byte_level)

    def encode_prompt(self, text: str) -> np.ndarray:
        """Encode the beginning of a document: encode(text) after the tokenizer's own start token (<s>), if any."""
        return np.asarray(self._backend.encode(text, add_special_tokens=True).ids, dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Encode one text: int64 [num_tokens], without an end of document."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], dtype: DTypeLike = np.int64) -> list[np.ndarray]:
        """Encode each text as encode() does, on all processor cores; dtype must hold all ids.

        Memory: the ids twice, and up to 400 MB for long texts.
        """
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        pieces = ((i, piece) for i, text in enumerate(texts) for piece in text_pieces(text, _PIECE_CHARACTERS))
        for batch in _batches(pieces, _BATCH_CHARACTERS):
            encoded = self._backend.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (i, _), each in zip(batch, encoded, strict=True):
                parts[i].append(np.asarray(each.ids, dtype=dtype))
        return [np.concatenate(each) if each else np.empty(0, dtype=dtype) for each in parts]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Decode token ids to text; bytes that are not UTF-8 (part of a character) become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    path: str | os.PathLike[str],
    special_tokens: Sequence[str] = (END_OF_DOCUMENT,),
) -> Tokenizer:
    """Train a byte-level BPE on the texts and write it to path, atomically.

    The same texts in the same order give the same tokenizer.

    Args:
        texts: training texts; read once.
        vocab_size: vocabulary entries, at least 257. A small text may give fewer.
        path: JSON file to write.
        special_tokens: special tokens, which get the first ids; one of them must end documents.

    Raises:
        InputError: vocab_size is too small, the package tokenizers is missing, path cannot be written.
    """
    least = MIN_VOCAB_SIZE - 1 + len(special_tokens)
    check(
        vocab_size >= least,
        f"vocab_size={vocab_size} must be at least {least} (256 bytes and {', '.join(special_tokens)})",
    )
    tokenizers = _import_tokenizers()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(iter(texts), trainer)
    try:
        replace_file(Path(path), backend.to_str(pretty=True).encode())
    except OSError as error:
        raise InputError(f"{path}: the tokenizer cannot be written ({error.strerror})") from error
    return Tokenizer(backend)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer that train_tokenizer wrote, or the tokenizer.json of a model.

    Raises:
        InputError: the file is missing or damaged, or the tokenizer has no token that ends documents.
    """
    tokenizers = _import_tokenizers()
    check(Path(path).exists(), f"{path}: no such tokenizer file")
    try:
        content = read_bounded(Path(path), _MOST_FILE_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    wrong = "not a tokenizer file, or a damaged one"
    with _library_errors(f"{path}: {wrong}", "train or copy it again"):
        backend = tokenizers.Tokenizer.from_buffer(content)
        largest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
    check(
        largest < _MOST_IDS,
        f"{path}: {wrong}: it has the token id {largest}, must be below {_MOST_IDS}; train or copy it again",
    )
    check(
        any(backend.token_to_id(end) is not None for end in _ENDS_OF_DOCUMENT),
        f"{path}: the tokenizer has no token {' or '.join(_ENDS_OF_DOCUMENT)}, which ends documents",
    )
    # Some faults of a file show only in use.
    with _library_errors(f"{path}: {wrong}", "train or copy it again"):
        tokenizer = Tokenizer(backend)
        tokenizer.decode(tokenizer.encode_prompt(_TRIAL))
    return tokenizer


@contextlib.contextmanager
def _library_errors(what: str, way_out: str) -> Iterator[None]:
    """Turn errors of the package (plain Exceptions, and panics of its Rust code) into an InputError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what} ({' '.join(str(error).split())[:200]}); {way_out}") from error


def _num_bytes(token: str, byte_level: bool) -> int:
    """Return the number of UTF-8 bytes of a token's text."""
    if byte_level:  # a byte-level token has one character per byte
        return len(token)
    if len(token) == 6 and token.startswith("<0x"):  # a token of a single byte, such as <0xE2>
        return 1
    return len(token.replace("\u2581", " ").encode())


def text_pieces(text: str, limit: int) -> Iterator[str]:
    """Cut a text into pieces of at most `limit` characters, after a line end if possible."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _batches(pieces: Iterable[tuple[int, str]], characters: int) -> Iterator[list[tuple[int, str]]]:
    """Yield the pieces in order, in lists; a list ends with the piece with which it has at least `characters`."""
    batch: list[tuple[int, str]] = []
    count = 0
    for piece in pieces:
        batch.append(piece)
        count += len(piece[1])
        if count >= characters:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


def _import_tokenizers() -> Any:
    try:
        import tokenizers  # noqa: PLC0415 (an extra: an indexed dataset does not need it)
    except ImportError:
        raise InputError(
            f"text needs the package tokenizers: {install_command('tokenizers')} (an indexed dataset does without)"
        ) from None
    return tokenizers
