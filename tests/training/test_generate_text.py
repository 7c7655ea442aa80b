"""Start here when `generate` prints another text than it returns, at a number of ranks, or none and no reason."""

import json
import re
from pathlib import Path

import pytest

from fused_megatron.checks import InputError
from fused_megatron.config.config_file import load_config
from fused_megatron.testing.run_on_ranks import RankError, run_on_ranks
from fused_megatron.training.convert import ConvertArguments, convert
from fused_megatron.training.generate_text import SEPARATOR, GenerateArguments, generate_text
from fused_megatron.training.train import train

# 9 heads and 3 key-value heads, as SmolLM2 has.
MODEL = {
    **{"num_layers": 2, "hidden_size": 36, "num_heads": 9, "num_kv_heads": 3, "ffn_hidden_size": 18, "seq_len": 32},
    **{"normalization": "rms_norm", "position": "rotary", "activation": "swiglu", "linear_biases": False},
    **{"init_std": 0.4, "tied_embeddings": False},
}
PROMPTS = ("page 7 of", "a", "another page says \u4e16")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    texts = [f"page {i} of {i * i} says {'ab' * (i % 5)} and more." for i in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {
        **{f"model.{name}": value for name, value in MODEL.items()},
        **{
            "data.path": folder / "texts.jsonl",
            "data.cache_folder": folder / "cache",
            "data.tokenizer_vocab_size": 290,
        },
        **{"training.num_steps": 1, "training.global_batch_size": 2, "training.microbatch_size": 2},
        "training.eval_batches": 1,
    }
    (folder / "config.toml").write_text("")
    train(
        load_config(folder / "config.toml", [f"--{name}={value}" for name, value in settings.items()]), folder / "run"
    )
    return folder / "run"


def asked(run: Path, **changes: object) -> GenerateArguments:
    return GenerateArguments(run, PROMPTS[0], **({"more_prompts": PROMPTS[1:], "num_tokens": 14, "seed": 3} | changes))


def shown(rank: int, world_size: int, arguments: list[GenerateArguments]) -> list[tuple[str, list[str]]]:
    """Return the text of each call, and the pieces in which it was shown."""
    found = []
    for each in arguments:
        pieces: list[str] = []
        found.append((generate_text(each, pieces.append), pieces))
    return found


def test_one_and_several_prompts_are_shown_as_they_come(run: Path) -> None:
    (several, pieces), (one, tokens) = shown(0, 1, [asked(run), asked(run, more_prompts=())])
    assert "".join(pieces) == several and "".join(tokens) == one
    texts = several.split(SEPARATOR)
    assert [text.startswith(prompt) for text, prompt in zip(texts, PROMPTS, strict=True)] == [True] * 3
    assert texts[0] == one and tokens[0] == PROMPTS[0] and len(tokens) > 7
    # A text of a batch is the text of its prompt with its seed.
    alone = GenerateArguments(run, PROMPTS[2], num_tokens=14, seed=5)
    assert generate_text(alone) == texts[2] != generate_text(GenerateArguments(run, PROMPTS[2], num_tokens=14, seed=6))


def test_tensor_and_pipeline_ranks_give_the_same_text(run: Path) -> None:
    greedy = asked(run, temperature=0.0)
    expected = [generate_text(asked(run)), generate_text(greedy)]
    stages = [asked(run, pipeline_parallel_size=2), asked(run, temperature=0.0, pipeline_parallel_size=2)]
    for ranks, arguments in ((3, [asked(run), greedy]), (2, stages)):
        for rank, found in enumerate(run_on_ranks(shown, ranks, arguments)):
            assert [text for text, _ in found] == expected
            assert all(pieces == [] for _, pieces in found) == (rank != 0)


def test_numbers_of_ranks_that_do_not_fit_are_named(run: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(shown, 2, [asked(run)])
    assert re.search(
        r"num_heads=9, num_kv_heads=3 and ffn_hidden_size=18 cannot be divided over tensor_parallel_size=2 "
        r"\(sizes that can: 1, 3, 9\): .* --pipeline-parallel-size 2",
        str(caught.value.errors[1]),
    )
    with pytest.raises(InputError, match="pipeline_parallel_size=2 must divide the number of ranks, 1"):
        generate_text(asked(run, pipeline_parallel_size=2))


def test_an_imported_model_trains_on_what_fits_here_and_generates_over_its_full_length(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(ConvertArguments("to-hf", run, tmp_path / "hf"))
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 1 << 22}))
    convert(ConvertArguments("from-hf", tmp_path / "hf", tmp_path / "run"))
    printed = capsys.readouterr().out
    text = (tmp_path / "run" / "config.toml").read_text()
    length = int(re.search(r"\nseq_len = (\d+)  # full length of the model: 4194304\n", text)[1])
    assert 128 <= length < 1 << 22
    assert re.search(
        rf"rank with \d+ GB free starts with seq_len={length}, .* \(full length of the model: 4194304\)", printed
    )
    # It starts to train, and is exported with its full length again.
    words = [f"--data.path={run.parent / 'texts.jsonl'}", f"--data.cache_folder={tmp_path}", "--training.num_steps=1"]
    words += ["--model.seq_len=16", "--training.eval_batches=1", "--training.global_batch_size=1"]
    train(load_config(tmp_path / "run" / "config.toml", words), tmp_path / "run")
    convert(ConvertArguments("to-hf", tmp_path / "run", tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(path.read_text())
    capsys.readouterr()
    generate_text(GenerateArguments(tmp_path / "run", PROMPTS[0], num_tokens=30))
    assert "slow" not in capsys.readouterr().out
    generate_text(GenerateArguments(run, PROMPTS[0], num_tokens=30))
    assert (
        "beyond 32 tokens each token is slow: it costs a forward over the last 32 (model.seq_len)"
        in capsys.readouterr().out
    )
