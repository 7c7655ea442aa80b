"""Start here when `fused-megatron preprocess` writes other tokens than training makes, or begins anew after a kill."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fused_megatron import cli
from fused_megatron.checks import InputError
from fused_megatron.data.corpus import prepare_corpus
from fused_megatron.data.indexed_dataset import IndexedDataset, dataset_files
from fused_megatron.data.preprocess import PreprocessArguments, preprocess

pytest.importorskip("tokenizers")

TEXTS = [f"document {i} " + "with some words " * (i % 9) for i in range(120)]


def write_files(folder: Path) -> Path:
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(lines[:60]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[60:100]).encode()))
    for i, text in enumerate(TEXTS[100:]):  # several of them are one part
        (folder / f"c{i:02}.txt").write_text(text)
    return folder


def run(folder: Path, output: Path, **options: object) -> tuple[dict[str, bytes], list[str]]:
    """Preprocess; return the files of the dataset by suffix, and the lines."""
    arguments = {"vocab_size": 290, "workers": 1, "part_mb": 1e-3, **options}
    said: list[str] = []
    preprocess(PreprocessArguments((folder,), str(output), **arguments), said.append)
    paths = [*dataset_files(output), Path(f"{output}.crc32.json"), Path(f"{output}.tokenizer.json")]
    assert not Path(f"{output}.parts").exists()
    return {path.name.removeprefix(output.name): path.read_bytes() for path in paths}, said


def test_any_number_of_processes_and_parts_gives_the_same_bytes_which_training_makes_too(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "text")
    whole, said = run(folder, tmp_path / "whole", part_mb=64)
    assert said[-1] == "joining 1 parts ..."
    cut, said = run(folder, tmp_path / "cut", workers=2)
    assert whole == cut and int(said[-1].split()[1]) > 5 and "with 2 processes" in said[1]
    dataset = IndexedDataset(tmp_path / "cut")
    corpus = prepare_corpus(folder, tmp_path / "cache", tokenizer_path=tmp_path / "cut.tokenizer.json")
    tokenizer = corpus.tokenizer()
    assert tokenizer is not None
    assert [tokenizer.decode(dataset[i][:-1]) for i in range(len(dataset))] == TEXTS
    assert all(dataset[i][-1] == tokenizer.end_of_document for i in range(len(dataset)))
    # Training makes the same tokens of the same text, and takes the dataset with its checksums.
    train = IndexedDataset(corpus.train_prefix)
    kept = [i for i in range(len(TEXTS)) if (i + 1) % 20]
    assert np.array_equal(train.tokens(0, train.total_tokens), np.concatenate([dataset[i] for i in kept]))
    indexed = prepare_corpus(tmp_path / "cut", tmp_path / "cache")
    assert indexed.vocab_size == tokenizer.vocab_size and dataset.digest is not None


def test_after_an_error_only_the_parts_that_are_missing_are_made(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "text")
    wanted, _ = run(folder, tmp_path / "wanted")
    given = tmp_path / "wanted.tokenizer.json"
    last = folder / "c19.txt"
    good = last.read_bytes()
    last.write_bytes(b"\xff" * len(good))
    with pytest.raises(InputError, match=r"c19\.txt: not UTF-8"):
        run(folder, tmp_path / "out", tokenizer=given)
    assert not (tmp_path / "out.bin").exists()
    # A part whose last file is missing, and that is cut short, is made again.
    parts = sorted((tmp_path / "out.parts").glob("*.crc32.json"))
    parts[0].unlink()
    index = Path(str(parts[1]).replace(".crc32.json", ".idx"))
    index.write_bytes(index.read_bytes()[:-1])
    last.write_bytes(good)
    found, said = run(folder, tmp_path / "out", tokenizer=given)
    assert found == wanted
    # A file that has changed since is encoded again.
    last.write_bytes(b"\xff" * len(good))
    with pytest.raises(InputError, match=r"c19\.txt: not UTF-8"):
        run(folder, tmp_path / "changed", tokenizer=given)
    last.write_bytes(good)
    first = folder / "a.jsonl"
    first.write_text(first.read_text().replace("document", "DOCUMENT"))
    assert run(folder, tmp_path / "changed", tokenizer=given)[0] == run(folder, tmp_path / "new", tokenizer=given)[0]
    assert said[0].startswith(f"{len(parts) - 2} of ") and said[0].endswith(" parts are there from a command before")


@pytest.mark.slow
def test_a_command_that_was_killed_goes_on_and_leaves_no_process(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(12):
        lines = (json.dumps({"text": f"file {i} line {j} " + "some words " * 200}) + "\n" for j in range(200))
        (folder / f"{i:02}.jsonl").write_text("".join(lines))
    wanted, _ = run(folder, tmp_path / "wanted", part_mb=0.2)
    command = [
        sys.executable,
        "-m",
        "fused_megatron",
        "preprocess",
        str(folder),
        "--output",
        str(tmp_path / "out"),
        "--tokenizer",
        str(tmp_path / "wanted.tokenizer.json"),
        "--workers",
        "2",
        "--part-mb",
        "0.2",
    ]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(tmp_path.glob("out.parts/*.crc32.json")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = len(list(tmp_path.glob("out.parts/*.crc32.json")))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert before and "parts are there from a command before" in done.stdout
    found = {name: (tmp_path / f"out{name}").read_bytes() for name in wanted}
    assert found == wanted
    # The workers of the killed command are gone: no process of its session is left.
    deadline = time.monotonic() + 60
    while any(_session(pid) == killed.pid for pid in _processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_session(pid) == killed.pid for pid in _processes())


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_files(tmp_path / "text")
    (tmp_path / "there.idx").touch()
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([folder], "--output must be given (see fused-megatron preprocess --help)"),
        (["--output", "x"], "FILES must name a file or folder"),
        ([folder, "--output", tmp_path / "there"], "there.idx exists: choose another prefix, or remove it"),
        ([tmp_path / "none.txt", "--output", tmp_path / "x"], "none.txt: no such file"),
        ([tmp_path / "empty", "--output", tmp_path / "x"], "the folder holds no files"),
        ([folder, "--output", tmp_path / "x", "--workers", "0"], "workers=0 must be 1 or more"),
        ([folder, "--output", tmp_path / "x", "--tokenizer", tmp_path / "t.json"], "t.json: no such tokenizer file"),
    ):
        assert cli.main(["preprocess", *map(str, words)]) == 2
        assert message in capsys.readouterr().err
