"""Start here when a model from a Hugging Face folder computes other logits or gradients than transformers does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fused_megatron.config.config_file import load_config
from fused_megatron.data.tokenizer import train_tokenizer
from fused_megatron.hugging_face import load_model
from fused_megatron.hugging_face.known_families import family_of
from fused_megatron.hugging_face.settings import Settings
from fused_megatron.hugging_face.source import open_source
from fused_megatron.mesh import init_mesh
from fused_megatron.models import GPT
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.testing.sharded_models import gradient_errors
from fused_megatron.training.convert import ConvertArguments, convert
from fused_megatron.training.generate_text import GenerateArguments, generate_text
from fused_megatron.training.train import train

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.modeling_utils")  # takes seconds: ranks are forked from a process that has it

SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.15,
}  # fmt: skip
GPT2 = {
    "vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "initializer_range": 0.15,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 300.0}
# name: (class name without Config or ForCausalLM, settings beside SIZES)
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 with its own head": ("GPT2", {**GPT2, "tie_word_embeddings": False, "activation_function": "gelu"}),
    "llama": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3, "vocab_size": 320}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 1, "sliding_window": 5, "head_dim": 12}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
}
TEXTS = [f"page {i} of {i * i} says {'ab' * (i % 5)} and more.\n" * 3 for i in range(40)]


def batch_of(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [B, S] and a random upstream gradient [B, S, V]."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(vocab_size, (2, 20), generator=generator)
    return tokens, torch.randn(2, 20, vocab_size, generator=generator)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder for each form with transformers, its logits, and its gradients in the files of a model."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, (kind, changes) in FORMS.items():
        config = getattr(transformers, f"{kind}Config")(**({} if kind == "GPT2" else SIZES) | changes)
        head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
        model = getattr(transformers, kind + head)(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        # qwen3 gets several files.
        model.save_pretrained(root / name, max_shard_size="20KB" if name == "qwen3" else "1GB")
        tokens, upstream = batch_of(config.vocab_size)
        logits = model(tokens).logits
        logits.backward(upstream)
        (root / name / "gradients").mkdir()
        save_file({"logits": logits.detach()}, root / name / "logits")
        save_file({key: p.grad for key, p in model.named_parameters()}, root / name / "gradients" / "model.safetensors")
        (root / name / "gradients" / "config.json").write_bytes((root / name / "config.json").read_bytes())
    train_tokenizer(TEXTS, 300, root / "llama" / "tokenizer.json")
    return root


def errors_of(rank: int, world_size: int, root: Path, sequence_parallel: bool) -> dict[str, float]:
    """Return the largest error of this rank's logits, and of each gradient relative to its largest value."""
    tp_group = init_mesh(world_size).tp_group if world_size > 1 else None
    errors = {}
    for form in FORMS:
        model = load_model(root / form, tp_group=tp_group, sequence_parallel=sequence_parallel).eval()
        tokens, upstream = batch_of(model.vocab_size)
        logits = model(tokens)
        width = logits.shape[-1]
        mine = slice(rank * width, (rank + 1) * width)
        padded = torch.nn.functional.pad(upstream, (0, width * world_size - upstream.shape[-1]))[..., mine]
        logits.backward(padded)
        expected = load_file(root / form / "logits")["logits"][..., mine]
        errors[f"{form}: logits"] = float((logits[..., : expected.shape[-1]] - expected).detach().abs().max())
        found = gradient_errors(model, open_source(root / form / "gradients").read)
        errors |= {f"{form}: {name}": error for name, error in found.items()}
    return errors


def both_layouts(rank: int, world_size: int, root: Path) -> list[dict[str, float]]:
    return [errors_of(rank, world_size, root, sequence_parallel) for sequence_parallel in (False, True)]


def test_logits_and_every_gradient_equal_those_of_transformers(models: Path) -> None:
    found = [errors_of(0, 1, models, False)]
    for rank in run_on_ranks(both_layouts, 2, models):
        found += rank
    assert len(found) == 5 and len(found[0]) > 100
    for errors in found:
        for name, error in errors.items():
            # Without rotation, the exact gradient of a key bias is 0; GPT-2 has it in one fused bias.
            assert error < (1e-4 if "logits" in name else 2e-5), f"{name}: {error:.1e}"


def stage_errors(rank: int, world_size: int, root: Path) -> dict[str, float]:
    """Return the largest error of the logits if every rank holds one pipeline stage."""
    errors = {}
    for form in FORMS:
        model = load_model(root / form, stage=(rank, world_size)).eval()
        assert isinstance(model, GPT)
        tokens, _ = batch_of(model.vocab_size)
        with torch.no_grad():
            hidden = torch.empty(tokens.shape[1], tokens.shape[0], model.config.hidden_size)
            hidden = model(tokens) if rank == 0 else hidden
            torch.distributed.broadcast(hidden, 0)
            if rank == world_size - 1:
                expected = load_file(root / form / "logits")["logits"]
                logits = model.logits(model(hidden))
                errors[form] = float((logits[..., : expected.shape[-1]] - expected).abs().max())
    return errors


def test_logits_of_two_stages_equal_those_of_transformers(models: Path) -> None:
    _, errors = run_on_ranks(stage_errors, 2, models)
    assert errors.keys() == FORMS.keys() and max(errors.values()) < 1e-4


@pytest.mark.parametrize(
    "form", [form if form in ("gpt2", "llama") else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_a_round_trip_gives_identical_tensors(models: Path, tmp_path: Path, form: str) -> None:
    run, back, narrow = tmp_path / "run", tmp_path / "back", tmp_path / "narrow"
    convert(ConvertArguments("from-hf", models / form, run))
    convert(ConvertArguments("to-hf", run, back, max_file_gb=3e-5))
    assert len(list(back.glob("*.safetensors"))) > 1
    assert_same_tensors(models / form, back)
    assert json.loads((back / "config.json").read_text()) == json.loads((models / form / "config.json").read_text())
    # transformers also reads what was written: the same config, and no weight is missing or unexpected.
    kind = FORMS[form][0] + ("LMHeadModel" if form.startswith("gpt2") else "ForCausalLM")
    loaded, info = getattr(transformers, kind).from_pretrained(back, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, _ = batch_of(loaded.config.vocab_size)
    expected = load_file(models / form / "logits")["logits"]
    torch.testing.assert_close(loaded.eval()(tokens).logits.detach(), expected, rtol=0, atol=0)
    # A round trip in 16 bits.
    convert(ConvertArguments("hf", run, narrow, dtype="bfloat16"))
    convert(ConvertArguments("hf", narrow, tmp_path / "narrow run"))
    convert(ConvertArguments("hf", tmp_path / "narrow run", tmp_path / "narrow back"))
    assert_same_tensors(narrow, tmp_path / "narrow back")


def assert_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = (
        {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        for folder in (one, other)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def import_and_use(rank: int, world_size: int, root: Path, work: Path, split: str) -> str:
    """Import on all ranks, generate, train a few steps and export; return the generated text."""
    run = work / f"run {world_size} {split}"
    convert(ConvertArguments("from-hf", root / "llama", run))
    text = generate_text(GenerateArguments(run, "page 7 of", num_tokens=12, temperature=0.0))
    options = (
        f"--parallel.{split}_parallel_size={world_size}", f"--data.path={work / 'text.txt'}", "--model.seq_len=16",
        f"--data.cache_folder={work / 'cache'}", "--training.num_steps=3", "--training.eval_interval=3",
        "--optimizer.lr=1e-3", "--optimizer.min_lr=0", "--optimizer.warmup_steps=0",
    )  # fmt: skip
    train(load_config(run / "config.toml", options), run)
    convert(ConvertArguments("to-hf", run, work / f"trained {world_size} {split}"))
    return text


def test_generate_and_train_go_on_from_an_imported_model_at_any_size(models: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(TEXTS), encoding="utf-8")
    layouts = ((1, "tensor"), (2, "tensor"), (2, "pipeline"))
    texts = {text for ranks, split in layouts for text in run_on_ranks(import_and_use, ranks, models, tmp_path, split)}
    model = transformers.LlamaForCausalLM.from_pretrained(models / "llama").eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(models / "llama" / "tokenizer.json"))
    prompt = tokenizer("page 7 of", return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(12):
            prompt = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], dim=1)
    assert texts == {tokenizer.decode(prompt[0])}
    # Training in another layout gives the same weights, which differ from the imported ones.
    trained = [tmp_path / f"trained {ranks} {split}" for ranks, split in layouts]
    one, *others, before = (load_file(folder / "model.safetensors") for folder in (*trained, models / "llama"))
    for name, tensor in one.items():
        for other in others:
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=2e-5)
        assert 1e-4 < float((tensor - before[name]).abs().max()) < 0.02, name
    config = json.loads((trained[1] / "config.json").read_text())
    assert config["max_position_embeddings"] == 64 and config["eos_token_id"] == 2
    loaded, info = transformers.LlamaForCausalLM.from_pretrained(trained[1], output_loading_info=True)
    assert not info["missing_keys"] and loaded.config.rope_parameters["rope_type"] == "llama3"


def test_training_in_16_bits_begins_from_the_imported_weights(models: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(TEXTS), encoding="utf-8")
    run = tmp_path / "run"
    convert(ConvertArguments("from-hf", models / "llama", run, dtype="bfloat16"))
    options = (
        f"--data.path={tmp_path / 'text.txt'}", f"--data.cache_folder={tmp_path / 'cache'}", "--training.num_steps=1",
        "--model.seq_len=16", "--optimizer.lr=1e-6", "--optimizer.min_lr=0",
    )  # fmt: skip
    train(load_config(run / "config.toml", options), run)
    convert(ConvertArguments("to-hf", run, tmp_path / "back"))
    before = load_file(models / "llama" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "back" / "model.safetensors").items():
        torch.testing.assert_close(tensor, before[name].bfloat16(), rtol=0.01, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "theirs", "ours"),
    [
        ("gpt2", {"resid_pdrop": 0.1, "attn_pdrop": 0.2, "embd_pdrop": 0.3}, (0.1, 0.2, 0.3)),
        ("llama", {"attention_dropout": 0.2}, (0.0, 0.2, 0.0)),
        ("bert", {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}, (0.1, 0.2, 0.1)),
    ],
)
def test_every_dropout_comes_over_and_goes_back(form: str, theirs: dict[str, float], ours: tuple[float, ...]) -> None:
    kind = {"gpt2": transformers.GPT2Config, "llama": transformers.LlamaConfig, "bert": transformers.BertConfig}[form]
    settings = kind(**(GPT2 if form == "gpt2" else SIZES), **theirs).to_dict()
    settings["architectures"] = [
        {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "bert": "BertForMaskedLM"}[form]
    ]
    family = family_of(Settings(settings, "config.json"))
    config = family.read_config(Settings(settings, "config.json"))
    assert (config.hidden_dropout, config.attention_dropout, config.embedding_dropout) == ours
    assert {name: family.write_config(config)[name] for name in theirs} == theirs
