"""Start here when tokens do not decode to the text that was encoded."""

import subprocess
import sys

import numpy as np
import pytest

from fused_megatron.checks import InputError
from fused_megatron.data.tokenizer import END_OF_DOCUMENT, load_tokenizer, text_pieces, train_tokenizer

pytest.importorskip("tokenizers")

TEXTS = [
    "def f(x):\n    return x + 1\n" * 20,
    "The quick brown fox jumps over the lazy dog. " * 20,
    "naïve café ☕ 東京\n" * 9,
]
ROUND_TRIPS = [
    "",
    " ",
    "\n\n\n\t  x \r\n\r y",
    "\x00\x01\x7f\x80\x9f\xa0\xad",
    "é e\u0301 ﬁ İ",
    "東京 한국어 العربية עברית हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \U0010ffff \ufeff \u2028",
    END_OF_DOCUMENT,
    f"a{END_OF_DOCUMENT}b <|endoftext",
    "Ġ Ċ ĠĠ",  # the characters that byte-level tokenizers write for space and newline
    "".join(chr(c) for c in range(0x800)),
    "1234567890 3.14e-10 don't I'LL x" * 50,
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, 300, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(path)


@pytest.mark.parametrize("text", ROUND_TRIPS, ids=range(len(ROUND_TRIPS)))
def test_round_trip_and_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.end_of_document not in ids


def test_random_texts(tokenizer):
    rng = np.random.default_rng(0)
    code_points = np.concatenate([np.arange(0xD800), np.arange(0xE000, 0x110000)])
    texts = ["".join(map(chr, rng.choice(code_points, size=int(n)))) for n in rng.integers(0, 60, size=100)]
    batch = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in batch] == texts
    assert all(np.array_equal(ids, tokenizer.encode(text)) for ids, text in zip(batch, texts, strict=True))
    assert [int(tokenizer.token_bytes[ids].sum()) for ids in batch] == [len(text.encode()) for text in texts]


def test_long_texts_are_encoded_a_part_at_a_time(tokenizer, monkeypatch):
    texts = ["ab cd\n" * 50, "", "x" * 99, "é\n" * 30]
    monkeypatch.setattr("fused_megatron.data.tokenizer._PIECE_CHARACTERS", 20)
    whole = tokenizer.encode_batch(texts)
    monkeypatch.setattr("fused_megatron.data.tokenizer._BATCH_CHARACTERS", 50)
    parts = tokenizer.encode_batch(texts, np.uint16)
    assert [each.dtype for each in parts] == [np.uint16] * 4
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert [tokenizer.decode(ids) for ids in parts] == texts


def test_it_compresses_and_has_the_size_asked_for(tokenizer):
    assert tokenizer.vocab_size == 300 == len(tokenizer.token_bytes)
    assert tokenizer.token_bytes[tokenizer.end_of_document] == 0
    assert tokenizer.decode([tokenizer.end_of_document]) == END_OF_DOCUMENT
    assert (np.delete(tokenizer.token_bytes, tokenizer.end_of_document) >= 1).all()
    assert len(tokenizer.encode(TEXTS[1])) * 2 < len(TEXTS[1])


def test_deterministic_across_processes(path, tmp_path):
    # Hash seeds differ from process to process.
    code = (
        "import sys\nfrom fused_megatron.data.tokenizer import train_tokenizer\n"
        f"train_tokenizer({TEXTS!r}, 300, sys.argv[1])"
    )
    again = tmp_path / "again.json"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(again)], check=True, timeout=600)
    assert again.read_bytes() == path.read_bytes()


def test_long_texts_are_cut_without_a_trace(tokenizer, monkeypatch):
    monkeypatch.setattr("fused_megatron.data.tokenizer._PIECE_CHARACTERS", 37)
    for text in ROUND_TRIPS + TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("limit", [1, 2, 5, 100])
def test_text_pieces(limit):
    for text in ("", "a", "ab\ncd\n\nefghijkl\n", "x" * 11, "\n" * 7):
        pieces = list(text_pieces(text, limit))
        assert "".join(pieces) == text and all(0 < len(p) <= limit for p in pieces)
    assert list(text_pieces("ab\ncd\nefghijk", 5)) == ["ab\n", "cd\n", "efghi", "jk"]


def test_small_texts_give_fewer_entries(tmp_path):
    tokenizer = train_tokenizer(["ab"], 8192, tmp_path / "small.json")
    assert tokenizer.vocab_size <= 260 and tokenizer.decode(tokenizer.encode("zß")) == "zß"
    assert train_tokenizer([], 257, tmp_path / "none.json").vocab_size == 257


def test_bad_input(path, tmp_path):
    with pytest.raises(InputError, match="vocab_size=256 must be at least 257"):
        train_tokenizer(TEXTS, 256, tmp_path / "x.json")
    with pytest.raises(InputError, match=r"nowhere/x\.json: the tokenizer cannot be written \(No such file"):
        train_tokenizer(TEXTS, 300, tmp_path / "nowhere" / "x.json")
    with pytest.raises(InputError, match=r"absent\.json: no such tokenizer file"):
        load_tokenizer(tmp_path / "absent.json")
    content = path.read_text(encoding="utf-8")
    damaged = tmp_path / "damaged.json"
    for text in ("", "{}", "[]", content[: len(content) // 2], content.replace('"BPE"', '"XYZ"'), "\x00" * 10):
        damaged.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"damaged\.json: ") as caught:
            load_tokenizer(damaged)
        assert "\n" not in str(caught.value)
    damaged.write_text(content.replace(END_OF_DOCUMENT, "<|end|>"), encoding="utf-8")
    with pytest.raises(InputError, match=r"has no token <\|endoftext\|>"):
        load_tokenizer(damaged)


def test_without_the_package_one_line_says_what_to_install(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r'pip install "tokenizers>=0.20"'):
        load_tokenizer(path)
    with pytest.raises(InputError, match=r'pip install "tokenizers>=0.20"'):
        train_tokenizer(TEXTS, 300, path)
