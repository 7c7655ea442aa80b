"""Start here when text that is shown token by token differs from the text of all tokens."""

from pathlib import Path

import pytest
import tokenizers

from fused_megatron.data.tokenizer import Tokenizer, train_tokenizer
from fused_megatron.inference.text_stream import TextStream

TEXT = "Caf\u00e9 \u4e16\u754c, two  spaces and \U0001f600\U0001f600.\n\n  The end."


def byte_level(folder: Path) -> Tokenizer:
    return train_tokenizer(["plain words of a text"], 257, folder / "tokenizer.json")


def metaspace(folder: Path) -> Tokenizer:
    """A tokenizer as Llama's: the decoder drops the first space, and bytes stand for rare characters."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [*"\u2581TwohespacndCaft.,", "\u2581the", "\u2581and"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: i for i, piece in enumerate(["</s>", *pieces])}, [], byte_fallback=True)
    )
    backend.add_special_tokens(["</s>"])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


@pytest.mark.parametrize("kind", [byte_level, metaspace])
def test_pieces_add_up_to_the_text_and_no_character_comes_in_parts(kind: object, tmp_path: Path) -> None:
    tokenizer = kind(tmp_path)  # type: ignore[operator]
    ids = tokenizer.encode(TEXT).tolist()
    for start in range(1, len(ids)):
        if "\ufffd" in tokenizer.decode(ids[:start]):
            continue
        stream = TextStream(tokenizer, ids[:start])
        pieces = [stream.add(token) for token in ids[start:]]
        assert "\ufffd" not in "".join(pieces)
        assert tokenizer.decode(ids[:start]) + "".join(pieces) == tokenizer.decode(ids), start
        assert stream.finish() == ""
        assert sum(piece != "" for piece in pieces) > (len(ids) - start) / 4


def test_bytes_that_are_no_character_come_at_the_end(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    smile = tokenizer.encode("\U0001f600").tolist()
    stream = TextStream(tokenizer, tokenizer.encode("so ").tolist())
    assert [stream.add(token) for token in smile[:3]] == ["", "", ""]
    assert "\ufffd" in stream.finish()
    assert stream.finish() == ""
