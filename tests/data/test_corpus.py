"""Start here when prepared documents differ from the text, or a cache is stale."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from fused_megatron.checks import InputError
from fused_megatron.data.corpus import prepare_corpus
from fused_megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter

pytest.importorskip("tokenizers")

VOCAB_SIZE = 300


def write_folder(folder, count=45):
    folder.mkdir()
    for i in range(count):
        text = f"# file {i}\ndef f{i}(x):\n    return x + {i}\n" * (i % 5 + 1)
        (folder / f"{i:03}.py").write_text(text)
    return folder


def prepare(path, cache, **options):
    return prepare_corpus(path, cache, VOCAB_SIZE, **options)


def texts(corpus, prefix):
    """Return the decoded documents of a part; each must end with the end of document."""
    tokenizer = corpus.tokenizer()
    dataset = IndexedDataset(prefix)
    assert all(dataset[i][-1] == tokenizer.end_of_document for i in range(len(dataset)))
    return [tokenizer.decode(dataset[i][:-1]) for i in range(len(dataset))]


def test_folder(tmp_path):
    folder = write_folder(tmp_path / "text")
    corpus = prepare(folder, tmp_path / "cache")
    train, validation = texts(corpus, corpus.train_prefix), texts(corpus, corpus.validation_prefix)
    every = [p.read_text() for p in sorted(folder.iterdir())]
    assert len(validation) == 2 and sorted(train + validation) == sorted(every)  # 5% of 45
    assert not set(train) & set(validation)
    assert [t for t in every if t in set(train)] == train
    tokenizer = corpus.tokenizer()
    assert corpus.vocab_size == tokenizer.vocab_size <= VOCAB_SIZE
    for prefix, tokens, part in (
        (corpus.train_prefix, corpus.train_tokens, train),
        (corpus.validation_prefix, corpus.validation_tokens, validation),
    ):
        dataset = IndexedDataset(prefix)
        assert dataset.total_tokens == tokens and dataset.dtype == np.uint16
        assert tokenizer.token_bytes[dataset.tokens(0, tokens)].sum() == sum(len(t.encode()) for t in part)
    batch = corpus.train_dataset(16, seed=0).batch(0, 4)
    assert batch.shape == (4, 17) and batch.max() < corpus.vocab_size
    assert corpus.validation_dataset(16).batch(0, 4).shape == (4, 17)


def test_cached_and_built_again_when_anything_changes(tmp_path):
    folder, cache = write_folder(tmp_path / "text"), tmp_path / "cache"
    stages = []

    def on_progress(stage, done, total):
        stages.append(stage)
        assert 0 <= done <= total or total == 0

    first = prepare(folder, cache, on_progress=on_progress)
    assert list(dict.fromkeys(stages)) == ["training the tokenizer", "tokenizing"]
    stages.clear()
    assert prepare(folder, cache, on_progress=on_progress) == first and stages == []
    assert prepare_corpus(folder, cache, 280).vocab_size == 280
    assert prepare(folder, cache, validation_fraction=0.2).validation_tokens > first.validation_tokens
    elsewhere = prepare(folder, tmp_path / "other")
    assert elsewhere.fingerprint == first.fingerprint and elsewhere.train_prefix != first.train_prefix
    (folder / "000.py").write_text("new")
    assert prepare(folder, cache).fingerprint != first.fingerprint


def test_damaged_cache_is_built_again(tmp_path):
    folder, cache = write_folder(tmp_path / "text"), tmp_path / "cache"
    first = prepare(folder, cache)
    for name in ("train.bin", "validation.idx", "tokenizer.json"):
        path = Path(first.train_prefix).parent / name
        content = path.read_bytes()
        path.write_bytes(content[:-20])
        with pytest.warns(RuntimeWarning, match="cached data is damaged and built again"):
            assert prepare(folder, cache) == first
        assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["one.txt", "one.jsonl"])
def test_one_document_is_divided_between_lines(tmp_path, name):
    text = "".join(f"line {i} of the text\n" + "\n" * (i % 7 == 0) for i in range(2000))
    (tmp_path / name).write_text(json.dumps({"text": text}) if name.endswith("jsonl") else text)
    corpus = prepare(tmp_path / name, tmp_path / "cache")
    (train,), (validation,) = texts(corpus, corpus.train_prefix), texts(corpus, corpus.validation_prefix)
    assert train + validation == text and train.endswith("\n\n")
    assert 0.045 < len(validation) / len(text) < 0.1


def test_without_lines_the_cut_is_anywhere(tmp_path):
    text = "æ" * 1000
    (tmp_path / "a.txt").write_text(text)
    corpus = prepare(tmp_path / "a.txt", tmp_path / "cache")
    assert texts(corpus, corpus.train_prefix) == ["æ" * 950]
    assert texts(corpus, corpus.validation_prefix) == ["æ" * 50]


def test_jsonl_by_lines(tmp_path):
    documents = [f"document {i} {'x' * i}" for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in documents))
    corpus = prepare(tmp_path / "a.jsonl", tmp_path / "cache", validation_fraction=0.1)
    assert texts(corpus, corpus.validation_prefix) == documents[9::10]
    assert texts(corpus, corpus.train_prefix) == [t for i, t in enumerate(documents) if i % 10 != 9]


def test_held_out_text_does_not_reach_the_tokenizer(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": "zqzqzqzq " * 50 if i % 20 == 19 else "hello world " * 5}) for i in range(40))
    )
    corpus = prepare(tmp_path / "a.jsonl", tmp_path / "cache")
    # The tokenizer has not seen this text: one token per byte.
    assert len(corpus.tokenizer().encode("zqzqzqzq")) == 8


def test_given_tokenizer(tmp_path):
    folder = write_folder(tmp_path / "text")
    first = prepare(folder, tmp_path / "cache")
    given = tmp_path / "given.json"
    given.write_bytes(Path(first.tokenizer_path).read_bytes())
    (tmp_path / "b.txt").write_text("def g(x):\n    return x\n" * 100)
    corpus = prepare(tmp_path / "b.txt", tmp_path / "cache", tokenizer_path=given)
    assert Path(corpus.tokenizer_path).read_bytes() == given.read_bytes()
    given.unlink()
    assert corpus.tokenizer().vocab_size == first.vocab_size
    with pytest.raises(InputError, match=r"given\.json: cannot be read"):
        prepare(tmp_path / "b.txt", tmp_path / "cache", tokenizer_path=given)


def write_indexed(prefix, count=40, length=30):
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for i in range(count):
            writer.add_document(np.arange(i, i + length))
    return prefix


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_indexed_dataset(tmp_path, suffix):
    prefix = write_indexed(tmp_path / "my.data")
    corpus = prepare(f"{prefix}{suffix}", tmp_path / "cache")
    assert corpus.train_prefix == corpus.validation_prefix == str(prefix)
    assert corpus.vocab_size == 69 and corpus.tokenizer() is None
    assert corpus.train_tokens == 38 * 30 and corpus.validation_tokens == 2 * 30
    train, validation = corpus.train_dataset(10, seed=0), corpus.validation_dataset(10)
    assert train.samples_per_epoch == (38 * 30 - 1) // 10
    assert validation.batch(0, validation.num_samples)[0].tolist() == list(range(19, 30))
    assert prepare(prefix, tmp_path / "cache", vocab_size=1000).vocab_size == 1000
    too_small = prepare(prefix, tmp_path / "cache", vocab_size=60).train_dataset(10, seed=0)
    with pytest.raises(InputError, match=r"my\.data\.bin, document 3\d, sample \d+: token id 6\d"):
        too_small.rows(0, too_small.samples_per_epoch)


def test_indexed_dataset_that_is_damaged(tmp_path):
    prefix = write_indexed(tmp_path / "data")
    os.truncate(f"{prefix}.bin", 100)
    with pytest.raises(InputError, match=r"data\.bin: size .* must be 2400 bytes, not 100"):
        prepare(prefix, tmp_path / "cache")
    os.unlink(f"{prefix}.idx")
    with pytest.raises(InputError, match=r"data\.idx: no such file"):
        prepare(prefix, tmp_path / "cache")
    with pytest.raises(InputError, match=r"nothing\.bin: there are no tokens in it"):
        prepare(write_indexed(tmp_path / "nothing", count=0), tmp_path / "cache")


def test_bad_input(tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(InputError, match="no such file, folder or indexed dataset"):
        prepare(tmp_path / "absent", cache)
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(InputError, match=r"bom\.txt: there is no text in it"):
        prepare(tmp_path / "bom.txt", cache)
    (tmp_path / "a.txt").write_text("a b c d e")
    for fraction in (0, 0.6, -1):
        with pytest.raises(InputError, match=f"validation_fraction={fraction} must be above 0"):
            prepare(tmp_path / "a.txt", cache, validation_fraction=fraction)
    with pytest.raises(InputError, match="vocab_size is for indexed datasets"):
        prepare(tmp_path / "a.txt", cache, vocab_size=300)
    with pytest.raises(InputError, match=r"vocab_size=10 must be at least 257"):
        prepare_corpus(tmp_path / "a.txt", cache, 10)
    small = prepare(tmp_path / "a.txt", cache)
    with pytest.raises(InputError, match="too few for one sample of seq_len=64"):
        small.train_dataset(64, seed=0)
    with pytest.raises(InputError, match=r"a\.txt/cache: cannot be written .*data\.cache_folder"):
        prepare(tmp_path / "a.txt", tmp_path / "a.txt" / "cache")
    assert not [p for p in cache.iterdir() if ".tmp-" in p.name]


def test_a_permission_lost_for_a_moment_builds_nothing_again(tmp_path, without_roots_rights):
    folder, cache = write_folder(tmp_path / "text"), tmp_path / "cache"
    prepared = Path(prepare(folder, cache).train_prefix).parent
    before = {path: path.stat().st_ino for path in prepared.iterdir()}
    for file in ("manifest.json", "train.idx", "train.bin", "train.crc32.json", "tokenizer.json"):
        (prepared / file).chmod(0)
        with without_roots_rights(), pytest.raises(InputError, match=rf"{file}: cannot be read \(Permission denied\)"):
            prepare(folder, cache)
        (prepared / file).chmod(0o666)
    assert {path: path.stat().st_ino for path in prepared.iterdir()} == before


def _prepare_and_report(path, cache, die_at, queue):
    # A fork must not use the thread pool that tokenizers may have had in its parent.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    stages = []

    def on_progress(stage, done, total):
        stages.append(stage)
        if stage == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    corpus = prepare(path, cache, on_progress=on_progress)
    queue.put((corpus.fingerprint, "tokenizing" in stages))


def test_ranks_at_once_after_one_was_killed(tmp_path):
    folder, cache = write_folder(tmp_path / "text"), tmp_path / "cache"
    processes = multiprocessing.get_context("fork")
    queue = processes.Queue()

    def start(die_at):
        process = processes.Process(target=_prepare_and_report, args=(folder, cache, die_at, queue))
        process.start()
        return process

    victim = start("tokenizing")
    victim.join(60)
    assert victim.exitcode == -signal.SIGKILL
    assert any(".tmp-" in p.name for p in cache.iterdir())
    ranks = [start(None) for _ in range(3)]
    reports = [queue.get(timeout=600) for _ in ranks]
    for rank in ranks:
        rank.join(60)
    assert len({fingerprint for fingerprint, _ in reports}) == 1
    assert sorted(built for _, built in reports) == [False, False, True]
    assert not any(".tmp-" in p.name for p in cache.iterdir())
    assert prepare(folder, cache).fingerprint == reports[0][0]
