"""The command `fused-megatron preprocess`: files of text to an indexed dataset, by several processes, resumable."""

import hashlib
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from fused_megatron.checks import InputError, check, check_positive
from fused_megatron.data.corpus import cache_key, file_digest, tokenizer_texts
from fused_megatron.data.document_files import is_lines
from fused_megatron.data.encode_part import Part, Piece, encode_part, num_processors, start_worker
from fused_megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, dataset_files, token_dtype
from fused_megatron.data.text_source import TextSource, path_source
from fused_megatron.data.token_digest import digest_path
from fused_megatron.data.tokenizer import (
    END_OF_DOCUMENT,
    MASKED_LM_TOKENS,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from fused_megatron.durable import replace_file

# Tokens that are held out of the training of a tokenizer, as in a run.
_HELD_OUT = 0.05
_PAUSE_S = 5.0


@dataclass(frozen=True)
class PreprocessArguments:
    """Arguments of `fused-megatron preprocess`."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files or folders: text, .jsonl, both with .gz; with the package datasets also .parquet, .csv and .json."""
    output: str
    """Prefix of the dataset: PREFIX.bin, PREFIX.idx, PREFIX.crc32.json and PREFIX.tokenizer.json."""
    tokenizer: Path | None = None
    """tokenizer.json to use. None: train a byte-level BPE on the files."""
    vocab_size: int = 8192
    """Vocabulary entries of a tokenizer that is trained."""
    masked: bool = False
    """Give a tokenizer that is trained [MASK] and the other special tokens of a BERT."""
    text_field: str = "text"
    """Field of a line of .jsonl, or column of a table, that holds the text."""
    workers: int | None = None
    """Processes. None: one for each processor."""
    part_mb: float = 64.0
    """Text of a part, in MB of 10^6 bytes. A command that was killed goes on after the parts that are whole."""

    def __post_init__(self) -> None:
        check(bool(self.files), "FILES must name a file or folder")
        check_positive("vocab_size", self.vocab_size)
        check(self.part_mb > 0, f"part_mb={self.part_mb} must be above 0")
        if self.workers is not None:
            check_positive("workers", self.workers)
        for file in dataset_files(self.output):
            check(not file.exists(), f"output={self.output}: {file} exists: choose another prefix, or remove it")


class PreprocessResult(NamedTuple):
    """What preprocess() wrote.

    Attributes:
        num_documents, num_tokens: size of the dataset.
        parts_found: parts that a command before had finished.
        num_parts: parts in all.
        tokenizer: path of the tokenizer beside the dataset.
    """

    num_documents: int
    num_tokens: int
    parts_found: int
    num_parts: int
    tokenizer: Path


def preprocess(arguments: PreprocessArguments, say: Callable[[str], None]) -> PreprocessResult:
    """Encode the files and write the dataset. The same files give the same bytes, with any number of workers.

    Args:
        arguments: of the command.
        say: prints a line.

    Raises:
        InputError: a file cannot be read or has another form, or the output cannot be written. Parts that are whole
            stay, and the same command goes on after them.

    Memory: of each worker some 100 MB, and several times its largest document.
    """
    sources = [path_source(path, arguments.text_field) for path in arguments.files]
    folder = Path(f"{arguments.output}.parts")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer_path = _tokenizer(arguments, sources, folder, say)
        parts = list(
            _parts(sources, folder, f"{file_digest(tokenizer_path)} {arguments.text_field}", arguments.part_mb)
        )
        missing = [part for part in parts if not _is_whole(part)]
        found = len(parts) - len(missing)
        if found:
            say(f"{found} of {len(parts)} parts are there from a command before")
        _encode_parts(missing, parts, tokenizer_path, arguments, say)
        say(f"joining {len(parts)} parts ...")
        num_documents, num_tokens = _join(parts, arguments.output, load_tokenizer(tokenizer_path))
        beside = Path(f"{arguments.output}.tokenizer.json")
        replace_file(beside, tokenizer_path.read_bytes())
        shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise InputError(f"output={arguments.output} cannot be written: {error.strerror or error}") from error
    return PreprocessResult(num_documents, num_tokens, found, len(parts), beside)


def _tokenizer(
    arguments: PreprocessArguments, sources: Sequence[TextSource], folder: Path, say: Callable[[str], None]
) -> Path:
    """Return the path of the tokenizer; train it, unless a command before has done so on the same files."""
    if arguments.tokenizer is not None:
        load_tokenizer(arguments.tokenizer)
        return arguments.tokenizer
    special = MASKED_LM_TOKENS if arguments.masked else (END_OF_DOCUMENT,)
    key = cache_key([[each.fingerprint() for each in sources], arguments.vocab_size, *special])
    path = folder / f"tokenizer-{key}.json"
    if not path.exists():  # it is written at once, or not at all
        say("training the tokenizer ...")
        total = sum(each.total_bytes() for each in sources)
        texts = (text for each in sources for text in tokenizer_texts(each, _HELD_OUT, total))
        train_tokenizer(texts, arguments.vocab_size, path, special)
    return path


def _parts(sources: Sequence[TextSource], folder: Path, settings: str, part_mb: float) -> Iterator[Part]:
    """Yield the parts in order. The name of a part differs if anything differs that its tokens depend on."""
    most, waiting, size = int(part_mb * 1e6), list[Piece](), 0
    stamps: dict[str, tuple[int, int]] = {}

    def part() -> Part:
        content = [settings, [(*piece, stamps[piece.path]) for piece in waiting]]
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]
        return Part(tuple(waiting), str(folder / name))

    for source in sources:
        for _, path in source.files:
            stat = path.stat()
            stamps[str(path)] = (stat.st_size, stat.st_mtime_ns)
            step = most if is_lines(path) else max(1, stat.st_size)
            for start in range(0, stat.st_size, step):
                end = min(start + step, stat.st_size)
                waiting.append(Piece(str(path), start, end if is_lines(path) else None))
                size += end - start
                if size >= most:
                    yield part()
                    waiting, size = [], 0
    if waiting:
        yield part()


def _is_whole(part: Part) -> bool:
    # The digest is written last.
    if not digest_path(part.prefix).exists():
        return False
    try:
        IndexedDataset(part.prefix)
    except InputError:
        return False
    return True


def _encode_parts(
    missing: Sequence[Part],
    parts: Sequence[Part],
    tokenizer_path: Path,
    arguments: PreprocessArguments,
    say: Callable[[str], None],
) -> None:
    if not missing:
        return
    workers = min(arguments.workers or num_processors(), len(missing))
    if workers == 1:
        say(f"encoding {len(missing)} parts ...")
        for part in missing:
            encode_part(part, str(tokenizer_path), arguments.text_field)
        return
    say(f"encoding {len(missing)} parts with {workers} process{'es' * (workers > 1)} ...")
    done, num_bytes, begin, said = len(parts) - len(missing), 0, time.perf_counter(), time.perf_counter()
    # Fresh processes: a fork of a process with threads, as the tokenizer has, may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start_worker, (workers,)) as pool:
        futures = [pool.submit(encode_part, part, str(tokenizer_path), arguments.text_field) for part in missing]
        try:
            for future in as_completed(futures):
                num_bytes += future.result()
                done += 1
                if time.perf_counter() - said > _PAUSE_S or done == len(parts):
                    said = time.perf_counter()
                    speed = num_bytes / 1e6 / (said - begin)
                    say(f"  {done} of {len(parts)} parts, {num_bytes / 1e6:,.0f} MB of text, {speed:.1f} MB/s")
        except BrokenProcessPool:
            raise InputError(
                f"a process that encoded was killed (too little memory?): the same command goes on after {done} of "
                f"{len(parts)} parts (fewer --workers need less memory)"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _join(parts: Sequence[Part], output: str, tokenizer: Tokenizer) -> tuple[int, int]:
    """Write the parts one after the other as one dataset; return the number of documents and tokens."""
    documents = tokens = 0
    with IndexedDatasetWriter(output, token_dtype(tokenizer.vocab_size), vocab_size=tokenizer.vocab_size) as writer:
        for part in parts:
            dataset = IndexedDataset(part.prefix)
            for index in range(len(dataset)):
                writer.add_document(dataset[index])
            documents += len(dataset)
            tokens += dataset.total_tokens
        check(documents > 0, "there is no text in the files")
    return documents, tokens
