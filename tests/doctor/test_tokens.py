"""Start here when the doctor misses a damaged token file, or reads for too long."""

from pathlib import Path

import numpy as np
import pytest

from fused_megatron.checks import InputError
from fused_megatron.data.indexed_dataset import IndexedDatasetWriter
from fused_megatron.data.token_digest import digest_path
from fused_megatron.doctor.command import parse_options
from fused_megatron.doctor.diagnosis import BROKEN, NOTE, diagnose
from fused_megatron.doctor.facts import Facts, Installation, Library, Machine, Network, TokenFile, Tools, Torch
from fused_megatron.doctor.output_formats import plain
from fused_megatron.doctor.tokens import find_tokens


def write(prefix: Path, flip: int | None = None) -> str:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document(range(50))
    if flip is not None:
        data = bytearray(Path(f"{prefix}.bin").read_bytes())
        data[flip] ^= 1
        Path(f"{prefix}.bin").write_bytes(bytes(data))
    return str(prefix)


def facts_of(tokens: tuple[TokenFile, ...]) -> Facts:
    """Return the facts of a machine of which only the token files are known."""
    installation, library = Installation("1", "3.12", "linux", None), Library("", False, False)
    return Facts(installation, Torch(), library, Tools(), Machine(), Network(), tokens=tokens)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "fused_megatron"


def test_named_datasets_and_prepared_text(tmp_path: Path, cache: Path) -> None:
    good, bad = write(tmp_path / "good"), write(tmp_path / "bad", flip=7)
    prepared = write(cache / "text-abc" / "train", flip=99)
    found = find_tokens([f"{good}.idx", bad, good])
    assert [(file.prefix, file.num_bytes, file.in_cache) for file in found] == [
        (good, 100, False),
        (bad, 100, False),
        (good, 100, False),
        (prepared, 100, True),
    ]
    problems = [file.problem for file in found]
    assert problems[0] is problems[2] is None
    assert f"{bad}.bin: the checksum of bytes 0 to 100 is " in str(problems[1])
    facts = facts_of(found)
    broken = [finding for finding in diagnose(facts) if finding.level == BROKEN and ".bin: " in finding.text]
    assert [finding.command for finding in broken] == ["", f"rm -r {cache}/text-abc  # it is prepared again"]
    said = "\n".join(plain(facts, []))
    assert f"{good}.bin: as its checksums say" in said and f"{bad}.bin: damaged" in said


def test_a_cache_is_read_for_a_while_only(tmp_path: Path, cache: Path) -> None:
    prepared = write(cache / "text-abc" / "train", flip=99)
    named = write(tmp_path / "named")
    found = find_tokens([named], patience_s=0.0)
    assert [(file.problem, file.is_read) for file in found] == [(None, True), (None, False)]
    facts = facts_of(found)
    commands = [finding.command for finding in diagnose(facts) if finding.level == NOTE]
    assert f"fused-megatron doctor --data {prepared}" in commands


def test_without_checksums_and_without_data(tmp_path: Path, cache: Path) -> None:
    prefix = write(tmp_path / "data")
    digest_path(prefix).unlink()
    (file,) = find_tokens([prefix])
    assert not file.has_digest and file.problem is None
    digest_path(prefix).write_text("{")
    (file,) = find_tokens([f"{prefix}.bin"])
    assert "data.crc32.json: damaged" in str(file.problem)
    with pytest.raises(InputError, match=r"--data .*absent: no such dataset"):
        find_tokens([str(tmp_path / "absent")])


def test_arguments() -> None:
    options = parse_options(["--data", "a", "--json", "--config", "c.toml", "--data", "b"])
    assert (options.as_json, options.datasets, options.config) == (True, ["a", "b"], "c.toml")
    for arguments in (["--data"], ["--help-me"], ["--json", "x"]):
        with pytest.raises(InputError, match="fused-megatron doctor: "):
            parse_options(arguments)
