"""Start here when a model with experts from a Hugging Face folder differs from transformers', in any layout."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from fused_megatron.checks import InputError
from fused_megatron.hugging_face import load_model
from fused_megatron.hugging_face.known_families import differing_fields, family_for, family_of
from fused_megatron.hugging_face.settings import Settings
from fused_megatron.hugging_face.source import open_source
from fused_megatron.inference.generation import generate
from fused_megatron.mesh import Mesh, init_mesh
from fused_megatron.sharding import parameter_record
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.testing.sharded_models import gradient_errors
from fused_megatron.training.convert import ConvertArguments, convert

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.modeling_utils")  # takes seconds: ranks are forked from a process that has it

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "eos_token_id": 2,
}
QWEN: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 24}
# name: (class name without Config or ForCausalLM, settings beside SIZES)
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 5}),
    "qwen3_moe": ("Qwen3Moe", {**QWEN, "head_dim": 12, "mlp_only_layers": [0], "norm_topk_prob": True}),
    "qwen2_moe": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 28, "decoder_sparse_step": 2}),
    "olmoe": ("Olmoe", {"num_experts": 4}),
}
# (name, sizes of the mesh, forms)
LAYOUTS: tuple[tuple[str, dict[str, int], tuple[str, ...]], ...] = (
    ("tp", {"tensor_parallel_size": 2}, ("qwen3_moe", "olmoe")),
    ("tp = ep", {"tensor_parallel_size": 2, "expert_parallel_size": 2}, ("mixtral", "qwen2_moe")),
    ("tp = etp", {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 2}, ("mixtral", "qwen3_moe")),
    ("dp = ep", {"expert_parallel_size": 2}, tuple(FORMS)),
)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [B, S] and a random upstream gradient [B, S, V]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(61, (2, 12), generator=generator), torch.randn(2, 12, 61, generator=generator)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder for each form with transformers, its logits, and its gradients in the files of a model."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokens, upstream = batch()
    for name, (kind, changes) in FORMS.items():
        config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            elif parameter.shape == (4, 32):  # transformers leaves some routers at 0
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(root / name)
        logits = model(tokens).logits
        logits.backward(upstream)
        save_file({"logits": logits.detach()}, root / name / "logits")
        # The gradients as weights, so that they are written under the names of the weights.
        for parameter in model.parameters():
            parameter.data = parameter.grad
        model.save_pretrained(root / name / "gradients")
    return root


def errors_of(form: str, root: Path, mesh: Mesh | None, sequence_parallel: bool = False) -> dict[str, float]:
    """Return the largest error of this rank's logits, and of each gradient relative to its largest value.

    Data-parallel ranks have one row of the batch each.
    """
    groups = {} if mesh is None else {f"{axis}_group": mesh[axis].group for axis in ("tp", "ep", "etp")}
    model = load_model(root / form, sequence_parallel=sequence_parallel, **groups).eval()
    tokens, upstream = batch()
    rows = slice(None) if mesh is None or mesh.dp_size == 1 else slice(mesh.dp_rank, mesh.dp_rank + 1)
    tp_rank, tp_size = (0, 1) if mesh is None else (mesh.tp_rank, mesh.tp_size)
    logits = model(tokens[rows])
    width = logits.shape[-1]
    mine = slice(tp_rank * width, (tp_rank + 1) * width)
    padding = (0, width * tp_size - 61)
    expected, given = (
        torch.nn.functional.pad(t[rows], padding)[..., mine]
        for t in (load_file(root / form / "logits")["logits"], upstream)
    )
    logits.backward(given)
    errors = {"logits": float((logits - expected)[..., : 61 - mine.start].detach().abs().max())}
    if mesh is not None:
        sum_over_replicas(model, mesh)
    return errors | gradient_errors(model, open_source(root / form / "gradients").read)


def sum_over_replicas(model: torch.nn.Module, mesh: Mesh) -> None:
    for parameter in model.parameters():
        replicas = mesh["dp"] if parameter_record(parameter).experts is None else mesh["edp"]
        if replicas.group is not None:
            dist.all_reduce(parameter.grad, group=replicas.group)


def in_layouts(rank: int, world_size: int, root: Path) -> dict[str, float]:
    found = {}
    for text, sizes, forms in LAYOUTS:
        mesh = init_mesh(**sizes)
        for form in forms:
            # With 4 heads and 4 experts, every size divides; sequence parallelism cuts the sequence before the router.
            errors = errors_of(form, root, mesh, sequence_parallel=form == "mixtral" and mesh.tp_size > 1)
            found |= {f"{form} {text}: {name}": error for name, error in errors.items()}
    return found


def test_logits_and_every_gradient_equal_those_of_transformers(models: Path) -> None:
    found = {f"{form}: {name}": error for form in FORMS for name, error in errors_of(form, models, None).items()}
    assert len(found) > 100
    for rank in run_on_ranks(in_layouts, 2, models):
        found |= rank
    for name, error in found.items():
        assert error < (1e-4 if "logits" in name else 2e-5), f"{name}: {error:.1e}"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("form", FORMS)
def test_a_round_trip_gives_identical_tensors(models: Path, tmp_path: Path, form: str) -> None:
    convert(ConvertArguments("from-hf", models / form, tmp_path / "run"))
    convert(ConvertArguments("to-hf", tmp_path / "run", tmp_path / "back", max_file_gb=3e-5))
    before, after = tensors_of(models / form), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    described = json.loads((models / form / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == described
    kind = getattr(transformers, f"{FORMS[form][0]}ForCausalLM")
    loaded, info = kind.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = load_file(models / form / "logits")["logits"]
    torch.testing.assert_close(loaded.eval()(batch()[0]).logits.detach(), expected, rtol=0, atol=1e-6)


def test_a_config_of_ours_is_what_transformers_reads(models: Path) -> None:
    """Without a config.json of an import, the family writes one, and transformers builds the same model from it."""
    for form, (kind, _) in FORMS.items():
        config = open_source(models / form).config
        family = family_for(config)
        assert family.model_type == form
        written = family.write_config(config)
        assert not differing_fields(family.read_config(Settings(written, "config.json")), config)
        built = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**written))
        shapes = {name: tuple(p.shape) for name, p in built.named_parameters()}
        original = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(models / form)
        assert shapes == {name: tuple(p.shape) for name, p in original.named_parameters()}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "noise in the router": ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported"),
    "clipped queries": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
    "a dense layer between others": (
        "qwen3_moe",
        {"mlp_only_layers": [1], "num_hidden_layers": 3},
        r"mlp_only_layers=\[1\] is not supported \(supported: 'the first layers",
    ),
    "windows that alternate": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": None},
        "layer_types=.* is not supported",
    ),
    "more experts of a token than there are": (
        "mixtral",
        {"num_experts_per_tok": 5},
        r"experts_per_token=5 must be at most num_experts=4 \(nearest: 4\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_feature_that_our_models_lack_is_refused(models: Path, case: str) -> None:
    form, changes, message = REFUSED[case]
    settings = Settings(json.loads((models / form / "config.json").read_text()) | changes, "config.json")
    with pytest.raises(InputError, match=message):
        family_of(settings).read_config(settings)


def test_no_family_has_a_model_that_drops_tokens(models: Path) -> None:
    config = replace(open_source(models / "mixtral").config, capacity_factor=1.0)
    with pytest.raises(InputError, match=r"nearest differs in capacity_factor=1.0 \(mixtral has None\)"):
        family_for(config)


def generated(rank: int, world_size: int, folder: Path) -> torch.Tensor:
    """Continue another prompt on each rank, by another number of tokens."""
    mesh = init_mesh(expert_parallel_size=world_size)
    model = load_model(folder, ep_group=mesh["ep"].group)
    return generate(model, batch()[0][rank : rank + 1, : 5 + rank], 3 + 4 * rank, temperature=0.0)


def test_ranks_that_share_experts_generate_texts_of_their_own(models: Path) -> None:
    model = load_model(models / "qwen2_moe")
    for rank, found in enumerate(run_on_ranks(generated, 2, models / "qwen2_moe")):
        expected = generate(model, batch()[0][rank : rank + 1, : 5 + rank], 3 + 4 * rank, temperature=0.0)
        assert torch.equal(found, expected)
