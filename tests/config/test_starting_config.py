"""Start here when the config that `fused-megatron init` writes does not train, or explains a key wrongly."""

import dataclasses
import re
from pathlib import Path

import pytest

from fused_megatron import cli
from fused_megatron.config import TrainConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.config.starting_config import field_docstrings, starting_config
from fused_megatron.untrusted_files import parse_toml

LIKE = ("gpt", "llama", "bert", "moe")


@pytest.mark.parametrize("like", LIKE)
def test_every_key_stands_there_once_below_its_meaning(tmp_path: Path, like: str) -> None:
    text = starting_config(like, "some.toml")
    (tmp_path / "c.toml").write_text(text)
    config = load_config(tmp_path / "c.toml")
    for section in dataclasses.fields(TrainConfig):
        written = text.partition(f"[{section.name}]\n")[2].partition("\n\n\n")[0]
        values = getattr(config, section.name)
        names = re.findall(r"^#?(\w+) =", written, re.MULTILINE)
        assert sorted(names) == sorted(field.name for field in dataclasses.fields(values))
        meanings = field_docstrings(type(values))
        for name in names:
            above = re.search(rf"((?:^# .*\n)+)#?{name} =", written, re.MULTILINE)
            assert above is not None
            assert " ".join(line[2:] for line in above[1].splitlines()) == meanings[name]
    # Without its comments the file says the same, and the defaults in the comments are the defaults.
    uncommented = re.sub(r"^#(\w+ = )", r"\1", re.sub(r"^#\w+ =$", "", text, flags=re.MULTILINE), flags=re.MULTILINE)
    (tmp_path / "d.toml").write_text(uncommented)
    assert load_config(tmp_path / "d.toml") == config
    assert len(parse_toml(uncommented.encode())["model"]) > len(parse_toml(text.encode())["model"]) + 20


def test_the_models_are_what_their_names_say(tmp_path: Path) -> None:
    models = {}
    for like in LIKE:
        (tmp_path / like).write_text(starting_config(like))
        models[like] = load_config(tmp_path / like).model
    assert models["llama"].position == "rotary" and models["llama"].kv_heads < models["llama"].num_heads
    assert models["gpt"].position == "learned" and models["gpt"].activation == "gelu"
    assert models["bert"].family == "bert" and models["moe"].num_experts == 8


@pytest.mark.parametrize(
    "like", ["llama", *(pytest.param(each, marks=pytest.mark.slow) for each in ("gpt", "bert", "moe"))]
)
def test_the_written_config_trains(tmp_path: Path, like: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my.toml"
    assert cli.main(["init", str(path), "--like", like]) == 0
    said = capsys.readouterr().out
    assert f"fused-megatron train {path}" in said
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"the quick brown fox {i} jumps over the lazy dog" for i in range(400))
    )
    words = [
        "train",
        str(path),
        "--data.path",
        str(tmp_path / "text.txt"),
        "--data.cache-folder",
        str(tmp_path / "cache"),
        "--data.tokenizer-vocab-size",
        "280",
        "--training.num-steps",
        "2",
        "--training.run-folder",
        str(tmp_path / "r"),
        "--training.eval-batches",
        "1",
    ]
    assert cli.main(words) == 0
    assert "step 2/2" in capsys.readouterr().out


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text("[model]\n")
    for words, wanted in (
        ([tmp_path / "mine.toml"], "mine.toml exists: give another name, or remove it first"),
        ([tmp_path / "mine"], "must end with .toml"),
        ([tmp_path / "no" / "mine.toml"], "cannot be written: No such file or directory"),
        ([tmp_path / "new.toml", "--like", "t5"], "--like='t5' must be one of gpt, llama, bert, moe"),
        ([], "CONFIG must be given (see fused-megatron init --help)"),
    ):
        assert cli.main(["init", *map(str, words)]) == 2
        assert wanted in capsys.readouterr().err
    assert (tmp_path / "mine.toml").read_text() == "[model]\n"
    assert not (tmp_path / "new.toml").exists()
