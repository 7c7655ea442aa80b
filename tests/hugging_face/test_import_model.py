"""Start here when an import of a Hugging Face folder is refused, or leaves something behind."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fused_megatron.checkpoint import CheckpointError
from fused_megatron.checkpoint.model_state import parameter_boxes
from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig
from fused_megatron.hugging_face.import_model import load_model
from fused_megatron.hugging_face.known_families import family_for
from fused_megatron.mesh import init_mesh
from fused_megatron.models import GPT
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.training.convert import ConvertArguments, convert

CONFIG = GPTConfig(
    num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, vocab_size=30, seq_len=8, ffn_hidden_size=24,
    activation="swiglu", normalization="rms_norm", position="rotary", linear_biases=False, tied_embeddings=False,
)  # fmt: skip
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small Llama in a folder."""
    return written(CONFIG, tmp_path / "in" / "llama")


def written(config: GPTConfig, folder: Path, form: str = "llama") -> Path:
    """Write a model with random weights as transformers does: two files and an index."""
    folder.mkdir(parents=True)
    family = family_for(config)
    assert family.model_type == form
    parameters = dict(GPT(config, device=torch.device("meta")).named_parameters())
    shapes = {name: box.full_shape for name, box in parameter_boxes(parameters).items()}
    rules = family.rules(config, family.prefix)
    names = {source: rule.source_shape(shapes[f"model.{rule.name}"]) for rule in rules for source in rule.sources}
    tensors = {name: torch.randn(shape) for name, shape in names.items()}
    files = {name: f"model-0000{1 + ('.1.' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps(family.write_config(config)))
    return folder


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Rewrite the second file."""

    def apply(folder: Path) -> None:
        file = folder / "model-00002-of-00002.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        files = {k: v for k, v in index.items() if v != file.name} | dict.fromkeys(tensors, file.name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    return apply


def change_bytes(change: Callable[[bytes], bytes], name: str = "model-00002-of-00002.safetensors") -> Any:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def header(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


SECOND = r"model-00002-of-00002\.safetensors: "
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (change_tensors(lambda t: t.pop(UP)), rf"tensor '{UP}' of shape \(24, 16\) is wanted by config"),
    "extra tensor": (
        change_tensors(lambda t: t.update({"model.layers.1.extra": torch.ones(2)})),
        r"tensor 'model\.layers\.1\.extra' of shape \(2,\) is there, but LlamaForCausalLM has none .* --skip",
    ),
    "wrong shape": (
        change_tensors(lambda t: t.update({UP: torch.ones(24, 15)})),
        SECOND + rf"tensor '{UP}' has shape \(24, 15\), but \(24, 16\) by config\.json",
    ),
    "more layers in the config": (
        change_config(num_hidden_layers=3),
        r"tensor 'model\.layers\.2\.\S+' .* \(and 8 more",
    ),
    "mixed dtypes": (
        change_tensors(lambda t: t.update({UP: t[UP].bfloat16()})),
        rf"'{UP}' is bfloat16 where .* --dtype",
    ),
    "half precision": (
        change_tensors(lambda t: t.update({k: v.half() for k, v in t.items()})),
        "is float16, which is not trained here: give --dtype float32",
    ),
    "an integer": (change_tensors(lambda t: t.update({UP: t[UP].int()})), rf"'{UP}' is int32"),
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json: it must be a folder as transformers"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{'"), r"config\.json is no JSON"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), r"must hold a JSON object, not list"),
    "unknown architecture": (
        change_config(model_type="mamba", architectures=["MambaForCausalLM"]),
        r"model_type='mamba' .* is not known \(known: GPT2LMHeadModel \(gpt2\), LlamaForCausalLM",
    ),
    "another head": (change_config(architectures=["LlamaForSequenceClassification"]), "is not known"),
    "a missing field": (change_config(num_hidden_layers="absent"), "the field num_hidden_layers is missing"),
    "a malformed field": (change_config(hidden_size="16"), "hidden_size='16' must be a whole number"),
    "a tokenizer that is cut": (lambda f: (f / "tokenizer.json").write_text("{"), r"tokenizer\.json is no JSON"),
    "a size beyond any": (
        change_config(hidden_size=10**9),
        "hidden_size=1000000000 must be a whole number from 1 to 167",
    ),
    "more layers than tensors": (
        change_config(num_hidden_layers=10**7),
        r"21 tensors are too few for num_layers=10000000 of config\.json",
    ),
    "no number": (change_config(rms_norm_eps=float("nan")), "rms_norm_eps=nan must be a finite number"),
    "an infinite number": (change_config(rms_norm_eps=float("inf")), "rms_norm_eps=inf must be a finite number"),
    "RoBERTa": (
        change_config(model_type="roberta", architectures=["RobertaForMaskedLM"]),
        r"model_type='roberta' .* is not known \(known: .* BertForMaskedLM \(bert\), MegatronBertForMaskedLM",
    ),
    "a size that does not fit": (
        change_config(num_key_value_heads=3),
        "num_heads=4 must be divisible by num_kv_heads=3",
    ),
    "half the biases": (change_config(attention_bias=True), r"mlp_bias=False is not supported \(supported: True\)"),
    "quantized": (change_config(quantization_config={"bits": 4}), "quantization_config=.* is not supported"),
    "an activation": (change_config(hidden_act="relu2"), "hidden_act='relu2' is not supported"),
    "longrope": (change_config(rope_scaling={"type": "longrope"}), "rope_scaling: rope_type='longrope' is not supp"),
    "rope without a factor": (
        change_config(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "rope_scaling: the field low_freq_factor is missing",
    ),
    "cut short": (change_bytes(lambda b: b[:-9]), SECOND + r"tensor '\S+' ends at byte \d+, but .* cut short"),
    "cut in the header": (change_bytes(lambda b: b[:100]), SECOND + "100 bytes that hold no whole safetensors header"),
    "empty file": (change_bytes(lambda b: b""), SECOND + "0 bytes that hold no whole"),
    "longer": (change_bytes(lambda b: b + b"xyz"), SECOND + "3 bytes behind the last tensor"),
    "header that is no JSON": (
        change_bytes(lambda b: header("{nonsense}")),
        SECOND + "its safetensors header is no JSON",
    ),
    "header without offsets": (
        change_bytes(lambda b: header('{"a": {"dtype": "F32", "shape": [1]}}') + b"1234"),
        SECOND + "tensor 'a': its entry in the header is malformed",
    ),
    "unknown dtype": (
        change_bytes(lambda b: header('{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}') + b"1"),
        SECOND + "tensor 'a': dtype 'F4' is not known",
    ),
    "offsets that overlap": (
        change_bytes(
            lambda b: (
                header(
                    '{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},'
                    '"b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}'
                )
                + b"123"
            )
        ),
        SECOND + "tensor 'b': its data_offsets leave a gap or overlap",
    ),
    "offsets of another size": (
        change_bytes(lambda b: header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}') + b"1234"),
        SECOND + r"tensor 'a': 4 bytes, but F32 of shape \(2,\) has 8",
    ),
    "missing file": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        SECOND + r"no such file, but model\.safetensors\.index\.json lists tensor 'model",
    ),
    "index that leaves the folder": (
        change_bytes(lambda b: b.replace(b'"model-00002', b'"../model-00002'), "model.safetensors.index.json"),
        "must be the name of a .safetensors file beside it",
    ),
    "index of another model": (
        change_bytes(lambda b: b.replace(b"up_proj", b"on_proj"), "model.safetensors.index.json"),
        "does not list it: they belong to different models",
    ),
    "index that is cut": (change_bytes(lambda b: b[:50], "model.safetensors.index.json"), "index.json is no JSON"),
    "pickles alone": (
        lambda f: [(f / "pytorch_model.bin").touch(), (f / "model.safetensors.index.json").unlink()],
        r"has neither model\.safetensors .* it has pytorch_model\.bin, a pickle, .*save_pretrained",
    ),
}


def refusals(rank: int, world_size: int, folders: list[Path], target: Path) -> list[str]:
    """Import each folder; return the error messages on this rank."""
    found = []
    for folder in folders:
        try:
            convert(ConvertArguments("from-hf", folder, target))
            found.append("not refused")
        except InputError as error:
            found.append(str(error))
    return found


def test_a_faulty_folder_is_refused_by_name_on_every_rank_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    folders = []
    for i, (change, _) in enumerate(CASES.values()):
        folders.append(tmp_path / "in" / f"{i}")
        shutil.copytree(source, folders[-1])
        change(folders[-1])
    (tmp_path / "out").mkdir()
    for messages in run_on_ranks(refusals, 2, folders, tmp_path / "out" / "run"):
        for (name, (_, pattern)), message in zip(CASES.items(), messages, strict=True):
            assert re.search(pattern, message), f"{name}: {message}"
            assert "\n" not in message
    assert list((tmp_path / "out").iterdir()) == []


def test_a_target_that_exists_is_left_alone(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "mine").touch()
    with pytest.raises(InputError, match="run exists already: choose another name"):
        convert(ConvertArguments("from-hf", source, run))
    assert [p.name for p in run.iterdir()] == ["mine"]
    convert(ConvertArguments("from-hf", source, tmp_path / "good"))
    with pytest.raises(InputError, match="run exists already"):
        convert(ConvertArguments("to-hf", tmp_path / "good", run))
    with pytest.raises(InputError, match=r"neither a folder of transformers' .* nor a run"):
        convert(ConvertArguments("hf", run, tmp_path / "new"))
    with pytest.raises(InputError, match="is no run folder"):
        convert(ConvertArguments("to-hf", source, tmp_path / "new"))
    with pytest.raises(InputError, match="'float16' is not trained here"):
        convert(ConvertArguments("from-hf", source, tmp_path / "new", dtype="float16"))


def test_a_failure_half_way_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    leftover = tmp_path / "out" / "run.tmp-0123abcd"
    leftover.mkdir()
    monkeypatch.setattr("fused_megatron.checkpoint.save.free_bytes", lambda folder: 1000)
    with pytest.raises(CheckpointError, match="disk full"):
        convert(ConvertArguments("from-hf", source, tmp_path / "out" / "run"))
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()
    convert(ConvertArguments("from-hf", source, tmp_path / "out" / "run"))
    data = next((tmp_path / "out" / "run" / "checkpoints").glob("*/*.safetensors"))
    damaged = bytearray(data.read_bytes())
    damaged[-5] ^= 1
    data.write_bytes(damaged)
    with (
        pytest.warns(RuntimeWarning, match="its checksum is"),
        pytest.raises(InputError, match="holds no checkpoint that verifies"),
    ):
        convert(ConvertArguments("to-hf", tmp_path / "out" / "run", tmp_path / "out" / "back"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["run"]


def test_names_that_older_checkpoints_have(source: Path, tmp_path: Path) -> None:
    tensors = {k: v for file in source.glob("*.safetensors") for k, v in load_file(file).items()}
    bare = tmp_path / "bare"
    bare.mkdir()
    change_config(tie_word_embeddings=True, architectures=["LlamaModel"])(source)
    shutil.copy(source / "config.json", bare)
    # A model without head, plus a buffer, a head of another task, and a stored copy of the tied head.
    names = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    names["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    names["lm_head.weight"] = names["embed_tokens.weight"].clone()
    save_file({**names, "score.weight": torch.ones(2)}, bare / "model.safetensors")
    model = load_model(bare, skip=["score.*"])
    assert torch.equal(model.token_embedding.weight[:30], tensors["model.embed_tokens.weight"])
    assert not model.token_embedding.weight[30:].any() and model.head is None
    save_file({**names, "lm_head.weight": torch.ones(30, 16)}, bare / "model.safetensors")
    with pytest.raises(
        InputError, match=r"'lm_head\.weight' differs from 'embed_tokens\.weight'.*--skip lm_head\.weight"
    ):
        load_model(bare)


def test_a_model_that_no_family_has() -> None:
    with pytest.raises(InputError, match=r"the nearest differs in normalization='layer_norm' \(llama has 'rms_norm'\)"):
        family_for(GPTConfig(**{**vars(CONFIG), "normalization": "layer_norm"}))
    with pytest.raises(InputError, match=r"the nearest differs in activation='gelu' \(llama has 'swiglu'\)"):
        family_for(GPTConfig(vocab_size=30, position="rotary"))
    assert family_for(GPTConfig(vocab_size=30)).model_type == "gpt2"
    assert family_for(GPTConfig(**{**vars(CONFIG), "sliding_window": 4})).model_type == "mistral"
    assert family_for(GPTConfig(**{**vars(CONFIG), "qkv_bias": True})).model_type == "qwen2"
    assert family_for(GPTConfig(**{**vars(CONFIG), "query_key_norm": True, "head_dim": 6})).model_type == "qwen3"


def peak_growth(rank: int, world_size: int, folder: Path, small: Path, run: Path) -> dict[str, int]:
    """Return the peak growth of this rank's resident memory, and the size of its shards, in bytes."""
    tp_group = init_mesh(world_size).tp_group
    # Load the code that is needed.
    convert(ConvertArguments("from-hf", small, run.with_name("small")))
    load_model(small, tp_group=tp_group)
    before = begin_peak()
    convert(ConvertArguments("from-hf", folder, run))
    imported, before = resident("VmHWM") - before, begin_peak()
    model = load_model(folder, tp_group=tp_group)
    loaded = resident("VmHWM") - before
    shard = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"imported": imported, "loaded": loaded, "shard": shard}


def begin_peak() -> int:
    """Reset VmHWM, the peak of the resident memory; return the resident memory now."""
    CLEAR_REFS.write_text("5")
    return resident("VmRSS")


def resident(kind: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


CLEAR_REFS = Path("/proc/self/clear_refs")
GPT2 = GPTConfig(num_layers=2, hidden_size=16, num_heads=4, vocab_size=30, seq_len=8)
FORMS = {"llama": (CONFIG, {"ffn_hidden_size": None, "num_kv_heads": None}), "gpt2": (GPT2, {})}
# A few blocks of 4 MiB are in memory at once, and not all freed memory returns to the system.
SLACK = 25_000_000


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("form", "sizes"), [
    *((form, {"hidden_size": 512, "num_layers": 4, "vocab_size": 24576}) for form in FORMS),
    *(pytest.param(form, {"hidden_size": 2048, "num_layers": 5, "vocab_size": 16000}, marks=pytest.mark.slow)
      for form in FORMS),
])  # fmt: skip
def test_a_rank_holds_its_shard_and_less_than_one_tensor(tmp_path: Path, form: str, sizes: dict[str, int]) -> None:
    config, own = FORMS[form]
    small = written(config, tmp_path / "in" / "small", form)
    folder = written(GPTConfig(**{**vars(config), **own, **sizes}), tmp_path / "in" / "large", form)
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    largest = 4 * sizes["hidden_size"] * sizes["vocab_size"]
    assert largest > 2 * SLACK
    for found in run_on_ranks(peak_growth, 2, folder, small, tmp_path / "run", timeout_s=300):
        assert whole / 2 <= found["shard"] < 0.52 * whole + 1e6
        assert found["loaded"] < found["shard"] + SLACK, found
        assert found["imported"] < largest + 2 * SLACK, found
