"""Start here when training reads other text than the file holds."""

import json

import pytest

from fused_megatron.checks import InputError
from fused_megatron.data.text_source import path_source, standard_library_source


def test_a_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo é\n".encode())
    source = path_source(tmp_path / "a.txt")
    assert list(source.documents()) == ["one\r\ntwo é\n"] == list(source.documents())


def test_a_document_larger_than_memory_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(1 << 43)  # sparse: it takes no room
    wanted = r"a.txt: a document of 8796.1 GB, of which 8796.1 GB are made in memory, and .* GB are free: divide"
    with pytest.raises(InputError, match=wanted):
        list(path_source(tmp_path / "a.txt").documents())


@pytest.mark.parametrize(("character", "made"), [("a", "0.3"), ("é", "0.7")])
def test_a_document_must_leave_room_for_what_is_made_of_it(tmp_path, monkeypatch, character, made):
    monkeypatch.setattr("fused_megatron.data.document_files.memory_bytes", lambda: (1e9, 0.2e9))
    (tmp_path / "a.txt").write_text("x" * ((64 << 20) + 1) + character)
    with pytest.raises(InputError, match=f"a document of 0.1 GB, of which {made} GB are made in memory, and 0.2 GB"):
        list(path_source(tmp_path / "a.txt").documents())


def test_a_folder_in_a_fixed_order(tmp_path):
    for name in ("b.txt", "a/z.md", "a.txt", "c.jsonl", ".hidden", ".git/x", "empty"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty" else name)
    (tmp_path / "c.jsonl").write_text('{"text": "c1"}\n\n{"text": "", "id": 1}\n{"id": 2, "text": "c2\\n"}')
    source = path_source(tmp_path)
    assert list(source.documents()) == ["a.txt", "a/z.md", "b.txt", "c1", "c2\n"]
    assert [name for name, *_ in source.fingerprint()] == ["a.txt", "a/z.md", "b.txt", "c.jsonl", "empty"]
    before = source.fingerprint()
    (tmp_path / "b.txt").write_text("changed")
    assert source.fingerprint() != before


def test_jsonl_is_text_as_it_was_written(tmp_path):
    texts = ["a\nb", "é☕👩‍👩‍👧", "\u2028 \x00 \\", "x" * 100_000]
    lines = [json.dumps({"text": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)]
    (tmp_path / "a.jsonl").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    assert list(path_source(tmp_path / "a.jsonl").documents()) == texts


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', r"not JSON \(.*\); each line must be a JSON object"),
        (b"plain text", "not JSON"),
        (b'["a"]', 'a JSON list; each line must be a JSON object with a field "text"'),
        (b"3", "a JSON int"),
        (b'{"body": "a", "id": 1}', r"no field text \(fields: body, id\)"),
        (b"{}", r"no field text \(fields: none\)"),
        (b'{"text": null}', "field text holds NoneType, not a string"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10 of the line"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=message) as caught:
        list(path_source(path).documents())
    assert str(caught.value).startswith(f"{path}:3: ") and "\n" not in str(caught.value)


def test_bad_paths(tmp_path):
    with pytest.raises(InputError, match=r"data\.path=.*absent: no such file, folder or indexed dataset"):
        path_source(tmp_path / "absent")
    with pytest.raises(InputError, match="the folder holds no files"):
        path_source(tmp_path)
    (tmp_path / "empty.txt").touch()
    for path in (tmp_path, tmp_path / "empty.txt"):
        with pytest.raises(InputError, match=r"there is no text in it \(0 bytes\)"):
            path_source(path)
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt: not UTF-8 at byte 2 .*convert the file"):
        list(path_source(tmp_path / "latin.txt").documents())
    (tmp_path / "corpus.idx").touch()
    with pytest.raises(InputError, match=r"holds an indexed dataset: give its prefix, .*/corpus$"):
        path_source(tmp_path)


def test_a_file_that_goes_away_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    source = path_source(tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InputError, match=r"a\.txt: cannot be read \(No such file"):
        list(source.documents())


def test_standard_library():
    source = standard_library_source()
    names = [name for name, _ in source.files]
    assert names == sorted(names) and len(set(names)) == len(names) > 300
    assert "json/decoder.py" in names and all(name.endswith(".py") for name in names)
    assert not any("site-packages" in name or "dist-packages" in name for name in names)
    assert source.total_bytes() > 5_000_000
