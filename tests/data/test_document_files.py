"""Start here when a file of one format gives other documents than it holds, or a format is trained on as raw text."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from fused_megatron.checks import InputError
from fused_megatron.data.document_files import file_documents
from fused_megatron.data.text_source import path_source

TEXTS = ["one\nline", "caf\u00e9 \u2615", "", "last"]


def write_lines(path: Path, field: str = "text") -> Path:
    content = "\n".join(json.dumps({field: text, "id": i}) for i, text in enumerate(TEXTS)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_packed_files_and_another_field(tmp_path: Path) -> None:
    wanted = [text for text in TEXTS if text]
    assert list(file_documents(write_lines(tmp_path / "a.jsonl"))) == wanted
    assert list(file_documents(write_lines(tmp_path / "a.jsonl.gz"))) == wanted
    assert list(file_documents(write_lines(tmp_path / "b.jsonl", "body"), "body")) == wanted
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress("\ufeffa t\u00e9xt".encode()))
    assert list(file_documents(tmp_path / "t.txt.gz")) == ["a t\u00e9xt"]
    with pytest.raises(
        InputError, match=r"b\.jsonl:1: no field text \(fields: body, id\).*data\.text_field names anoth"
    ):
        list(file_documents(tmp_path / "b.jsonl"))


def test_a_cut_or_false_gz_file_is_named(tmp_path: Path) -> None:
    packed = gzip.compress(b"a text " * 1000)
    for name, content in (("cut.txt.gz", packed[:-9]), ("false.txt.gz", b"no gzip at all")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: .*(not a whole \.gz file|cannot be read)"):
            list(file_documents(tmp_path / name))


def test_parts_of_a_file_have_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = [f"{i} " + "x" * (i * 7 % 23) for i in range(60)]
    path.write_bytes("\n".join(json.dumps({"text": text}) for text in texts).encode())
    size = path.stat().st_size
    for step in (1, 17, 64, size // 2, size):
        parts = [list(file_documents(path, start=at, end=min(at + step, size))) for at in range(0, size, step)]
        assert [text for part in parts for text in part] == texts
    path.write_bytes(path.read_bytes() + b"\n{3}\n")
    with pytest.raises(InputError, match=rf"a\.jsonl, byte {size + 1}: not JSON"):
        list(file_documents(path, start=size - 5))


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.json", "A.JSON", "b.csv.gz"])
def test_tables_are_refused_by_name_without_their_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    (tmp_path / name).write_text('text,id\n"a",1\n')
    with pytest.raises(InputError, match=rf'{name}: .* read by the package datasets: pip install "datasets>=3"'):
        path_source(tmp_path)


@pytest.mark.parametrize("name", ["a.zip", "a.jsonl.zst", "a.tar", "a.TSV"])
def test_other_formats_are_refused_before_they_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text\n")
    with pytest.raises(InputError, match="holds no documents that can be read here: "):
        path_source(tmp_path / name)


def test_tables_by_their_reader(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    import pyarrow  # noqa: PLC0415 (comes with datasets)
    import pyarrow.csv  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    table = pyarrow.table({"text": TEXTS, "body": [text.upper() for text in TEXTS]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "a.csv")
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    wanted = [text for text in TEXTS if text]
    for name in ("a.parquet", "a.csv", "a.json"):
        assert list(file_documents(tmp_path / name)) == wanted, name
    assert list(file_documents(tmp_path / "a.parquet", "body")) == [text.upper() for text in wanted]
    with pytest.raises(InputError, match=r"a\.parquet, row 1: no field prose \(fields: body, text\)"):
        list(file_documents(tmp_path / "a.parquet", "prose"))
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read"):
        list(file_documents(tmp_path / "a.parquet"))
