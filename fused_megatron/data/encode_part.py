"""Encoding of a part of the text in a process of its own, which starts without torch."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fused_megatron.data.document_files import file_documents
from fused_megatron.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from fused_megatron.data.tokenizer import load_tokenizer

_ENCODE_CHARACTERS = 1 << 21


class Piece(NamedTuple):
    """A file, or the lines of a .jsonl file that begin in the bytes start to end."""

    path: str
    start: int
    end: int | None


class Part(NamedTuple):
    """Consecutive pieces that one process encodes, and the prefix of their dataset."""

    pieces: tuple[Piece, ...]
    prefix: str


def num_processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker(workers: int) -> None:
    """End this process when its parent is gone, even if the parent was killed; and share the cores."""
    os.environ["RAYON_NUM_THREADS"] = str(max(1, num_processors() // workers))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent lets the parts under way become whole
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def encode_part(part: Part, tokenizer_path: str, text_field: str) -> int:
    """Write the dataset of a part; return the bytes of its text."""
    tokenizer = load_tokenizer(tokenizer_path)
    dtype = token_dtype(tokenizer.vocab_size)
    num_bytes = 0
    with IndexedDatasetWriter(part.prefix, dtype, vocab_size=tokenizer.vocab_size) as writer:
        for texts in _batches(part, text_field):
            for ids in tokenizer.encode_batch(texts, dtype):
                num_bytes += int(tokenizer.token_bytes[ids].sum())
                writer.add_document(np.append(ids, dtype.type(tokenizer.end_of_document)))
    return num_bytes


def _batches(part: Part, text_field: str) -> Iterator[list[str]]:
    waiting, size = list[str](), 0
    for path, start, end in part.pieces:
        for text in file_documents(Path(path), text_field, start, end):
            waiting.append(text)
            size += len(text)
            if size >= _ENCODE_CHARACTERS:
                yield waiting
                waiting, size = [], 0
    if waiting:
        yield waiting
