"""Start here when transformers does not end, pad or score a text with an exported folder as this package does."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import InputError
from fused_megatron.config import BERTConfig, GPTConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.data.tokenizer import MASKED_LM_TOKENS, Tokenizer, load_tokenizer, train_tokenizer
from fused_megatron.hugging_face import load_model
from fused_megatron.hugging_face.tokenizer_files import end_tokens, special_ids, write_tokenizer_files
from fused_megatron.training.convert import ConvertArguments, convert
from fused_megatron.training.generate_text import SEPARATOR, GenerateArguments, generate_text
from fused_megatron.training.train import train

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.modeling_utils")

# Documents of a few tokens, so that a model learns in seconds where they end.
TEXTS = [f"{'ab' * (1 + i % 3)} {i % 4}" for i in range(60)]
LLAMA = {
    "normalization": "rms_norm",
    "position": "rotary",
    "activation": "swiglu",
    "linear_biases": False,
    "num_kv_heads": 1,
    "tied_embeddings": False,
}
PROMPTS = ("ab", "ababab", "abab", "ab 1")


@pytest.fixture(scope="module", params=[LLAMA, {}], ids=["llama", "gpt2"])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, and its export in the folder "hf" beside it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    model = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "seq_len": 16, **request.param}
    words = [f"--model.{name}={value}" for name, value in model.items()] + [
        f"--data.path={folder / 'texts.jsonl'}",
        f"--data.cache_folder={folder / 'cache'}",
        "--data.tokenizer_vocab_size=260",
        "--optimizer.lr=3e-2",
        "--optimizer.warmup_steps=2",
        "--training.num_steps=40",
        "--training.global_batch_size=8",
        "--training.microbatch_size=8",
        "--training.eval_interval=40",
        "--training.eval_batches=1",
    ]
    (folder / "config.toml").write_text("")
    train(load_config(folder / "config.toml", words), folder / "run")
    convert(ConvertArguments("to-hf", folder / "run", folder / "hf"))
    return folder / "run"


def test_special_ids_are_those_of_the_run(run: Path) -> None:
    end = load_tokenizer(run / "tokenizer.json").end_of_document
    hf = run.with_name("hf")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((hf / name).read_text())
        assert {key: values[f"{key}_token_id"] for key in ("bos", "eos", "pad")} == dict.fromkeys(
            ("bos", "eos", "pad"), end
        )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(hf)
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == end


def test_the_tokenizer_encodes_the_same(run: Path) -> None:
    ours, theirs = (
        load_tokenizer(run / "tokenizer.json"),
        transformers.AutoTokenizer.from_pretrained(run.with_name("hf")),
    )
    for text in ("ab 12", "caf\u00e9  two\n\n\u4e16 ", "<s> no token"):
        assert theirs(text)["input_ids"] == ours.encode_prompt(text).tolist()
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == theirs.pad_token_id == ours.end_of_document
    batch = theirs(["ab", "ababab 1"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 0 and set(batch) == {"input_ids", "attention_mask"}
    assert theirs.model_max_length == 16


def test_transformers_continues_a_padded_batch_as_generate_does_and_ends(run: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.with_name("hf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(run.with_name("hf")).eval()
    batch = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**batch, max_new_tokens=9, do_sample=False)
    assert tokens.shape[1] < batch["input_ids"].shape[1] + 9
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    ours = generate_text(GenerateArguments(run, PROMPTS[0], PROMPTS[1:], num_tokens=9, temperature=0.0))
    assert ours.split(SEPARATOR) == texts
    assert len(set(texts)) >= 3


def log_likelihoods(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], side: str) -> list[float]:
    """Score continuations in one padded batch, as evaluation harnesses do."""
    tokenizer.padding_side = side
    batch = tokenizer([context + continuation for context, continuation in pairs], padding=True, return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(**batch, position_ids=positions).logits.log_softmax(-1)
    found = []
    for row, (context, continuation) in enumerate(pairs):
        ids, present = batch["input_ids"][row], batch["attention_mask"][row].nonzero().flatten()
        count = len(tokenizer(context + continuation)["input_ids"]) - len(tokenizer(context)["input_ids"])
        assert count > 0 and len(present) < len(ids) + (row == 0)
        picked = present[-count:]
        found.append(float(logits[row, picked - 1, ids[picked]].sum()))
    return found


def test_continuations_score_the_same_in_a_padded_batch(run: Path) -> None:
    pairs = [("ababab", " 3 more"), ("ab", " 1"), ("abab", " 2"), ("b", "a")]
    hf = run.with_name("hf")
    tokenizer, model = (
        load.from_pretrained(hf) for load in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM)
    )
    ours = load_model(hf).eval()
    for side in ("left", "right"):
        for found, (context, continuation) in zip(
            log_likelihoods(model.eval(), tokenizer, pairs, side), pairs, strict=True
        ):
            ids = load_tokenizer(run / "tokenizer.json").encode(context + continuation)
            count = len(ids) - len(load_tokenizer(run / "tokenizer.json").encode(context))
            tokens = torch.from_numpy(ids)[None]
            with torch.no_grad():
                losses = ours(tokens[:, :-1], tokens[:, 1:])[0, -count:]
            assert found == pytest.approx(-float(losses.sum()), abs=1e-4)


def test_an_imported_tokenizer_alone_gets_the_files_that_transformers_needs(run: Path, tmp_path: Path) -> None:
    hf = run.with_name("hf")
    (tmp_path / "own").mkdir()
    for path in hf.iterdir():
        if path.name not in ("tokenizer_config.json", "generation_config.json"):
            (tmp_path / "own" / path.name).write_bytes(path.read_bytes())
    convert(ConvertArguments("from-hf", tmp_path / "own", tmp_path / "run"))
    convert(ConvertArguments("to-hf", tmp_path / "run", tmp_path / "back"))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "back").padding_side == "left"
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((hf / "config.json").read_text())
    # A file of the original stays as it is.
    (tmp_path / "own" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    convert(ConvertArguments("from-hf", tmp_path / "own", tmp_path / "run 2"))
    convert(ConvertArguments("to-hf", tmp_path / "run 2", tmp_path / "back 2"))
    assert (tmp_path / "back 2" / "generation_config.json").read_text() == '{"eos_token_id": [7, 9]}'


def with_start_token() -> Tokenizer:
    """A tokenizer that puts <s> before every text and has a padding token, as Llama's."""
    names = ["<unk>", "<s>", "</s>", "<pad>", "a", "b"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>")
    )
    backend.add_special_tokens(names[:4])
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend)


def test_special_ids_of_other_tokenizers(tmp_path: Path) -> None:
    assert special_ids(with_start_token()).as_fields() == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    # Without a tokenizer the fields are there, since transformers' defaults are tokens of other models.
    config = transformers.LlamaConfig(**special_ids(None).as_fields())
    assert config.eos_token_id is None and config.bos_token_id is None


def test_a_masked_language_model_gets_its_mask_and_no_generation(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 270, tmp_path / "tokenizer.json", MASKED_LM_TOKENS)
    write_tokenizer_files(tmp_path, tokenizer, BERTConfig(vocab_size=270, seq_len=32))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    named = (loaded.pad_token_id, loaded.cls_token_id, loaded.sep_token_id, loaded.mask_token_id)
    assert named == tuple(tokenizer.special_ids[name] for name in MASKED_LM_TOKENS)
    assert loaded.padding_side == "right" and not (tmp_path / "generation_config.json").exists()
    write_tokenizer_files(tmp_path, tokenizer, GPTConfig())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).mask_token_id is not None  # a file that exists stays


def test_the_ends_of_a_text(tmp_path: Path) -> None:
    tokenizer, run = with_start_token(), RunFolder(tmp_path)
    assert end_tokens(run, tokenizer) == {2}
    run.hugging_face.mkdir()
    (run.hugging_face / "config.json").write_text('{"eos_token_id": 4}')
    assert end_tokens(run, tokenizer) == {2, 4}
    (run.hugging_face / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert end_tokens(run, tokenizer) == {2, 3, 5}
    (run.hugging_face / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id='x' must be a whole number or a list"):
        end_tokens(run, tokenizer)
