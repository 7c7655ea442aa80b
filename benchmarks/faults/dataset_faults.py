"""Faults of token datasets (PREFIX.bin with PREFIX.idx): cut, shifted, flipped; an array that outlives its set."""

import gc
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from outcomes import Answer, Outcome, ending_words, error_words, on_ranks, text_of
from savers import megatron

from fused_megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from fused_megatron.data.token_digest import check_small

NUM_DOCUMENTS, LENGTH, VOCABULARY = 100, 50, 1000
_HEADER_BYTES = 34
READERS = {"fused-megatron": "fused-megatron", "megatron-core, mmap": "mmap", "megatron-core, mmap=False": "no mmap"}


def tokens_of(document: int) -> np.ndarray:
    return (np.arange(LENGTH) * 7 + document) % VOCABULARY


def write(prefix: Path) -> None:
    with IndexedDatasetWriter(prefix, np.dtype(np.int32), vocab_size=VOCABULARY) as writer:
        for document in range(NUM_DOCUMENTS):
            writer.add_document(tokens_of(document))


def opened(reader: str, prefix: Path) -> Any:
    """A dataset as a training run opens it."""
    if reader == "fused-megatron":
        dataset = IndexedDataset(prefix)
        check_small(prefix, dataset.digest)
        return dataset
    indexed = megatron(".datasets.indexed_dataset")
    return indexed.IndexedDataset(str(prefix), mmap=reader == "mmap")


def read(rank: int, ranks: int, reader: str, prefix: Path) -> Answer:
    """Open the set and read all of it: how many documents are wrong, or the first error and where it came."""
    try:
        dataset = opened(reader, prefix)
    except Exception as error:
        return "error", f"at the start|{text_of(error)}"
    wrong = []
    for document in range(NUM_DOCUMENTS):
        try:
            if not np.array_equal(dataset[document], tokens_of(document)):
                wrong.append(int(np.max(dataset[document])))
        except Exception as error:
            return "error", f"when document {document} is drawn|{text_of(error)}"
    return "value", (len(wrong), max(wrong, default=0))


def read_after(rank: int, ranks: int, reader: str, prefix: Path) -> Answer:
    """A document is read when its dataset is gone."""
    document = opened(reader, prefix)[5]
    gc.collect()
    right = np.array_equal(document, tokens_of(5))
    return "value", (int(not right), int(document.max()))


def words(answer: Answer, folder: Path) -> str:
    kind, value = answer
    if kind == "error":
        when, _, text = value.partition("|")
        return f"{when}: {error_words(text, folder)}"
    if kind != "value":
        return ending_words(answer)
    wrong, largest = value
    beyond = f", ids up to {largest:,}" if largest >= VOCABULARY else ""
    if not wrong:
        return "reads what was written"
    return f"**reads {wrong} of {NUM_DOCUMENTS} documents wrong, silently**{beyond}"


def faulty(reader: str, damage: Callable[[Path], None], folder: Path) -> str:
    if reader != "fused-megatron":
        megatron(".datasets.indexed_dataset")
    write(folder / "set")
    damage(folder / "set")
    return words(on_ranks(read, 1, reader, folder / "set")[0], folder)


def outlived(reader: str, folder: Path) -> str:
    if reader != "fused-megatron":
        megatron(".datasets.indexed_dataset")
    write(folder / "set")
    return words(on_ranks(read_after, 1, reader, folder / "set")[0], folder)


def cut(suffix: str, prefix: Path) -> None:
    path = Path(f"{prefix}{suffix}")
    os.truncate(path, path.stat().st_size // 2)


def shift_pointers(prefix: Path) -> None:
    """Every byte pointer three bytes further."""
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    begin = _HEADER_BYTES + 4 * NUM_DOCUMENTS
    for place in range(begin + 8, begin + 8 * NUM_DOCUMENTS, 8):
        struct.pack_into("<q", content, place, struct.unpack_from("<q", content, place)[0] + 3)
    path.write_bytes(content)


def flip_a_bit(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_magic(prefix: Path) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(b"X" + path.read_bytes()[1:])


def in_all(function: Callable[..., str], *args: Any) -> dict[str, Outcome]:
    return {column: partial(function, reader, *args) for column, reader in READERS.items()}


FAULTS: dict[str, dict[str, Outcome]] = {
    "the .bin file is cut to half": in_all(faulty, partial(cut, ".bin")),
    "pointers of the .idx file are 3 bytes off": in_all(faulty, shift_pointers),
    "one flipped bit in the .bin file": in_all(faulty, flip_a_bit),
    "the .idx file is cut to half": in_all(faulty, partial(cut, ".idx")),
    "the .idx file begins with another magic": in_all(faulty, other_magic),
    "a document is used when its dataset is gone": in_all(outlived),
}
