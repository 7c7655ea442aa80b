"""A byte-level BPE tokenizer: trained with Hugging Face tokenizers, kept as one JSON file."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fused_megatron.checks import InputError, check
from fused_megatron.durable import replace_file
from fused_megatron.untrusted_files import read_bounded

END_OF_DOCUMENT = "<|endoftext|>"
# What it is called in tokenizers that others made, the first that is there.
_ENDS_OF_DOCUMENT = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
# What a masked-LM needs, in BERT's words; [SEP] ends documents.
MASKED_LM_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
# The 256 bytes and the end of document.
MIN_VOCAB_SIZE = 257
# Encoding keeps some 100 bytes a token until all that is encoded at once is done, so long documents are encoded in
# pieces, enough at once for the cores.
_PIECE_CHARACTERS = 1 << 20
_AT_ONCE_CHARACTERS = 1 << 22
# The largest vocabularies have a quarter of a million entries, and files of some 40 MB; there is a table of all ids.
_MOST_IDS = 1 << 24
_MOST_FILE_BYTES = 1 << 30
_TRIAL = "Some words, 3 of them: caf\u00e9.\n"


class Tokenizer:
    """Text to token ids and back; byte-level ones exactly: decode(encode(text)) == text for every text of UTF-8.

    Text that reads "<|endoftext|>" is encoded as any other text; only end_of_document is the special token.

    Attributes:
        vocab_size: number of ids.
        end_of_document: the id of "<|endoftext|>", or of what others call it.
        token_bytes: int64 [vocab_size], how many UTF-8 bytes each id stands for (0 for special tokens). Summed over
            the tokens of a text it gives the length of the text in bytes.
        special_ids: the tokens that no text gives, and their ids.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        # Not a part of the JSON file; without it a text could forge an end of document.
        self._backend.encode_special_tokens = True
        # Some that come with a model cut or fill every text to the length that it saw.
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
        """Token ids of the beginning of a document: encode(text), behind what the tokenizer puts there (<s>)."""
        return np.asarray(self._backend.encode(text, add_special_tokens=True).ids, dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one text: int64 [num_tokens], without an end of document."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], dtype: DTypeLike = np.int64) -> list[np.ndarray]:
        """Token ids of each text, as encode() gives them, of any dtype that holds them; on all processor cores.

        Memory: the ids twice, and up to 400 MB where the texts are long.
        """
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        pieces = ((i, piece) for i, text in enumerate(texts) for piece in text_pieces(text, _PIECE_CHARACTERS))
        for some in _groups(pieces, _AT_ONCE_CHARACTERS):
            encoded = self._backend.encode_batch_fast([piece for _, piece in some], add_special_tokens=False)
            for (i, _), each in zip(some, encoded, strict=True):
                parts[i].append(np.asarray(each.ids, dtype=dtype))
        return [np.concatenate(each) if each else np.empty(0, dtype=dtype) for each in parts]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of token ids; bytes that are no UTF-8 (of a token cut in the middle) become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    path: str | os.PathLike[str],
    special_tokens: Sequence[str] = (END_OF_DOCUMENT,),
) -> Tokenizer:
    """Train a byte-level BPE on the texts and write it to path (whole or not at all).

    The same texts in the same order give the same tokenizer.

    Args:
        texts: read once.
        vocab_size: at least 257; small texts may give fewer entries.
        path: JSON file.
        special_tokens: the first ids; one of them ends documents.

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
    """Read a tokenizer that train_tokenizer wrote, or one that came with a model.

    Raises:
        InputError: no such file, a damaged one, or a tokenizer without a token that ends documents.
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
    # Some faults of a file show when it is used.
    with _library_errors(f"{path}: {wrong}", "train or copy it again"):
        tokenizer = Tokenizer(backend)
        tokenizer.decode(tokenizer.encode_prompt(_TRIAL))
    return tokenizer


@contextlib.contextmanager
def _library_errors(what: str, way_out: str) -> Iterator[None]:
    """The errors of the package, plain Exceptions and panics, as an InputError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what} ({' '.join(str(error).split())[:200]}); {way_out}") from error


def _num_bytes(token: str, byte_level: bool) -> int:
    """UTF-8 bytes of text that a token stands for."""
    if byte_level:  # one character of its name for each
        return len(token)
    if len(token) == 6 and token.startswith("<0x"):  # a byte that is no part of a whole character
        return 1
    return len(token.replace("\u2581", " ").encode())


def text_pieces(text: str, limit: int) -> Iterator[str]:
    """Cut a text into pieces of at most `limit` characters, after a line end where there is one."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _groups(pieces: Iterable[tuple[int, str]], characters: int) -> Iterator[list[tuple[int, str]]]:
    """All pieces in order, some at a time: each group ends with the piece that reaches so many characters."""
    group: list[tuple[int, str]] = []
    count = 0
    for piece in pieces:
        group.append(piece)
        count += len(piece[1])
        if count >= characters:
            yield group
            group, count = [], 0
    if group:
        yield group


def _import_tokenizers() -> Any:
    try:
        import tokenizers  # noqa: PLC0415 (an extra: only those who bring text need it)
    except ImportError:
        raise InputError(
            "text needs the package tokenizers: pip install fused-megatron[text] (an indexed dataset does without)"
        ) from None
    return tokenizers
