"""Start here when a model made on the meta device is filled with wrong weights."""

import json
import resource

import pytest
import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it
from safetensors.torch import load_file, save_file

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.hugging_face import load_model
from fused_megatron.sharding import full_tensor
from fused_megatron.testing import run_on_ranks

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 61, "intermediate_size": 48}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16}
GEMMA = {"num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8}
MODELS = {
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, GEMMA),  # no file has the buffer of its embedding
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "bert": (hf.BertForMaskedLM, hf.BertConfig, {}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {"n_positions": 16}),
}


def saved(folder):
    """Save every model as several files with an index."""
    for name, (kind, config, more) in MODELS.items():
        small = SMALL if name != "gpt2" else {k: v for k, v in SMALL.items() if k[:3] not in ("max", "int")}
        torch.manual_seed(0)
        kind(config(**small, **more)).save_pretrained(folder / name, max_shard_size="20KB")
        assert (folder / name / "model.safetensors.index.json").exists()


def on_meta(folder, name):
    kind, config, _ = MODELS[name]
    with torch.device("meta"):
        return kind(config.from_pretrained(folder / name)).eval()


def loads(rank, world_size, folder):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    ids = torch.arange(3, 15).view(2, 6)
    for name, (kind, _, _) in MODELS.items():
        original = kind.from_pretrained(folder / name).eval()
        model = fm.parallelize(on_meta(folder, name), mesh, sequence_parallel=True)
        assert fm.load_pretrained_shards(model, folder / name) is model
        assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
        for key, value in fm.full_state_dict(model).items():
            assert torch.equal(value, original.state_dict()[key]), key
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-5)
        head = model.get_output_embeddings()
        assert head.weight is model.get_input_embeddings().weight
    refusals(mesh, folder, rank)


def refusals(mesh, folder, rank):
    model = fm.parallelize(on_meta(folder, "llama"), mesh)
    (base,) = (path for path in folder.glob("broken-*") if path.name.endswith(f"{rank}"))
    for name, message in (
        ("truncated", r"model.safetensors: tensor .* ends at byte .*: cut short \(copy"),
        ("missing", r"state has no 'model.norm.weight' \(strict"),
        ("left_over", "state has, and the model has not, 'model.extra'"),
        ("other_shape", r"state\['model.norm.weight'\].shape=\(31,\) must be \(32,\)"),
        ("no_file", "x.safetensors: no such file, but model.safetensors.index.json lists tensor 'a' there"),
        ("no_json", "index.json is no JSON"),
        ("quantised", r"state\['model.norm.weight'\].dtype=int8 must be float64, .*dequantised first"),
    ):
        with pytest.raises(InputError, match=message):
            fm.load_pretrained_shards(model, base / name)
        assert all(p.is_meta for p in model.parameters())
    with pytest.raises(InputError, match=r"model\.norm\.weight is on the meta device, and no file has it \(where"):
        fm.load_pretrained_shards(model, base / "missing", strict=False)
    here = base / "missing" if rank == 1 else folder / "llama"  # only one rank has a wrong folder
    with pytest.raises(InputError, match=("" if rank == 1 else r"ranks \[1\] refused this, .*") + "state has no"):
        fm.load_pretrained_shards(model, here)
    assert all(p.is_meta for p in model.parameters())


def broken(folder, base):
    tensors = {}
    for path in (folder / "llama").glob("*.safetensors"):
        tensors |= load_file(path)
    norm = tensors["model.norm.weight"]
    for name, change in (
        ("truncated", {}),
        ("missing", {"model.norm.weight": None}),
        ("left_over", {"model.extra": norm.clone()}),
        ("other_shape", {"model.norm.weight": norm[1:].clone()}),
        ("quantised", {"model.norm.weight": norm.to(torch.int8)}),
    ):
        (base / name).mkdir(parents=True)
        kept = {key: value for key, value in (tensors | change).items() if value is not None}
        save_file(kept, base / name / "model.safetensors")
    file = base / "truncated" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for name, text in (("no_file", json.dumps({"weight_map": {"a": "x.safetensors"}})), ("no_json", "{")):
        (base / name).mkdir()
        (base / name / "model.safetensors.index.json").write_text(text)


def test_loads_and_refuses(tmp_path):
    saved(tmp_path)
    for rank in range(2):
        broken(tmp_path, tmp_path / f"broken-{rank}")
    run_on_ranks(loads, 2, tmp_path, timeout_s=240)


def highest(rank, world_size, folder):
    """Return the peak growth of a rank's memory, and the size of its shards, in bytes."""
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    fm.load_pretrained_shards(fm.parallelize(on_meta(folder, "gpt2"), mesh), folder / "gpt2")  # the code that it needs
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig.from_pretrained(folder / "large"))
    fm.parallelize(model, mesh)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fm.load_pretrained_shards(model, folder / "large")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return 1024 * grown, sum(p.numel() * p.itemsize for p in model.parameters())


def test_a_rank_holds_its_shards_and_a_part_of_one_tensor(tmp_path):
    saved(tmp_path)
    wide = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8192, "num_hidden_layers": 6}
    hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL | wide)).save_pretrained(tmp_path / "large", max_shard_size="60MB")
    largest = 8192 * 512 * 4
    # Blocks for reading columns, and pages that are not reused yet.
    slack = 12_000_000
    for grown, shards in run_on_ranks(highest, 2, tmp_path, timeout_s=240):
        assert 0.9 * shards < grown < shards + largest + slack < 2 * shards


def test_one_rank(tmp_path):
    saved(tmp_path)
    model = fm.parallelize(on_meta(tmp_path, "gpt2"), None)
    fm.load_pretrained_shards(model, tmp_path / "gpt2")
    original = hf.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    assert all(torch.equal(v, original.state_dict()[k]) for k, v in fm.full_state_dict(model).items())


def padding_only(rank, world_size, folder):
    """Load a vocabulary of 5 over 4 ranks with 2 rows each: the last rank holds only padding."""
    mesh, ids = fm.init_mesh(tensor_parallel_size=world_size), torch.arange(5).view(1, 5)
    for name, (kind, _, _) in MODELS.items():
        original = kind.from_pretrained(folder / name).eval()
        model = fm.load_pretrained_shards(fm.parallelize(on_meta(folder, name), mesh), folder / name)
        state = fm.full_state_dict(model)
        assert all(torch.equal(state[key], value) for key, value in original.state_dict().items()), name
        fm.load_full_state_dict(model, {key: value + 1 for key, value in state.items()})
        again = fm.full_state_dict(model)
        assert all(torch.equal(again[key], value + 1) for key, value in state.items()), name
        fm.load_full_state_dict(model, state)
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-5)
        model(ids, labels=ids).loss.backward()
    # Our models pad the vocabulary to 128 entries: three of four ranks hold only padding.
    ours = load_model(folder / "gpt2", tp_group=mesh.tp_group)
    on_one_rank = dict(load_model(folder / "gpt2").named_parameters())
    for key, parameter in ours.named_parameters():
        full = full_tensor(parameter, parameter, mesh.tp_group)
        assert torch.equal(full, full_tensor(on_one_rank[key], on_one_rank[key], None)), key


def test_ranks_that_hold_only_padding_of_a_vocabulary(tmp_path):
    for name, (kind, config, more) in MODELS.items():
        few = SMALL | {"vocab_size": 5}
        few = few if name != "gpt2" else {k: v for k, v in few.items() if k[:3] not in ("max", "int")}
        torch.manual_seed(0)
        kind(config(**few, **more)).save_pretrained(tmp_path / name)
    run_on_ranks(padding_only, 4, tmp_path, timeout_s=100)
