"""Start here when `fm.parallelize` changes the numbers of a model of transformers, or refuses it without a reason."""

import copy
import warnings

import pytest
import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.interop import full_tensor
from fused_megatron.interop.full_state import is_transposed
from fused_megatron.testing import run_on_ranks

# Sizes under all names that configurations use; each configuration takes the names that it has.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim"), 32),
    **dict.fromkeys(("n_head", "n_heads", "num_attention_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), 48),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "query_pre_attn_scalar", "num_mel_bins", "image_size"), 8),
    **dict.fromkeys(("embedding_size", "q_lora_rank", "kv_lora_rank", "max_source_positions", "projection_dim"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "patch_size", "rotary_dim"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "window_size", "sliding_window"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "decoder_sparse_step", "max_window_layers"), 1),
    "vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "decoder_attention_heads": 4, "word_embed_proj_dim": 32,
    "num_decoder_layers": 2, "decoder_start_token_id": 0, "attention_types": [[["global", "local"], 1]],
}  # fmt: skip
# (architecture, its configuration, sizes that differ from SIZES)
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {}),
    "opt": ("OPTForCausalLM", "OPTConfig", {}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {"new_decoder_architecture": True}),
    "phi": ("PhiForCausalLM", "PhiConfig", {"num_key_value_heads": 4}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {}),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", {}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", {}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {"num_key_value_heads": 4, "head_dim": 4}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {}),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", {"intermediate_size_mlp": 48}),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", {}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {}),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", {}),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {}),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {}),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", {}),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", {}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {}),
    "t5_gated": ("T5ForConditionalGeneration", "T5Config", {"feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", "BartConfig", {}),
    "marian": ("MarianMTModel", "MarianConfig", {}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {}),
    "vit": ("ViTForImageClassification", "ViTConfig", {}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}),
    "clip": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {}),
}
# (number of sharded layers, outcome of sequence parallelism) of a family.
SAMPLE = {
    "gpt_neox": (10, "the same"),
    "opt": (14, "sequence_dim=1 must be a dim of"),  # its layers flatten their activations
    "gemma2": (16, "the same"),
    "t5": (38, "attends to a second sequence, encoder_hidden_states"),
    "vit": (12, "sequence length=5 must be divisible"),
    "gpt_bigcode": (6, "stands in a layer that would run on blocks"),
    "mixtral": (12, "stands in a layer that would run on blocks"),
}


def built(family):
    """Return a model with random weights (also of norms and biases) and without dropout."""
    architecture, configuration, more = FAMILIES[family]
    kind = getattr(hf, configuration)
    known = kind().to_dict()
    aliases = {name for name, other in kind.attribute_map.items() if other in known}
    chosen = {k: v for k, v in SIZES.items() if k in known and k not in aliases}
    chosen |= {
        k: 0.0 for k, v in known.items() if isinstance(v, float) and k.endswith(("drop", "dropout", "layerdrop"))
    }
    dropouts = [k for k in known if "drop" in k or k.endswith("pdrop")]
    chosen |= {k: 0.0 for k in dropouts if isinstance(known[k], float)}
    config = kind(**chosen | more)
    if family.startswith("t5"):
        config.decoder_start_token_id = 0
    torch.manual_seed(0)
    model = getattr(hf, architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.add_(0.1 * noise) if parameter.dim() == 1 else parameter.copy_(0.15 * noise)
    return model.train()


def batch(model):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (2, 8), generator=generator)
    if model.main_input_name == "pixel_values":
        images = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
        return images | ({"labels": torch.tensor([0, 1])} if hasattr(model, "classifier") else {})
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 32, generator=generator), "labels": ids}
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    masked = {} if type(model).__name__.startswith("Mamba") else {"attention_mask": mask}
    return {"input_ids": ids, **masked, "labels": ids.masked_fill(mask == 0, -100)}


def trained(model):
    """Return (output, loss) after backward."""
    result = model(**batch(model))
    output = next(result[k] for k in ("logits", "image_embeds", "last_hidden_state") if k in result)
    loss = result.get("loss")
    if loss is None:
        loss = (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).sum()
    loss.backward()
    return output.detach(), loss.detach()


def error_of(a, b):
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-2)).item()


def outcome(family, mesh, sequence_parallel):
    """Return (number of sharded layers, "the same"), or (0, the error message)."""
    original = built(family)
    model = copy.deepcopy(original)
    kinds = [type(module) for module in model.modules()]
    try:
        fm.parallelize(model, mesh, sequence_parallel=sequence_parallel)
    except InputError as error:
        assert [type(module) for module in model.modules()] == kinds
        return 0, str(error)
    sharded = len(model.parallel_report.sharded)
    state = fm.full_state_dict(model)
    assert all(torch.equal(state[name], value) for name, value in original.state_dict().items()), "state"
    theirs = trained(original)
    try:
        ours = trained(model)
    except InputError as error:
        return sharded, str(error)
    errors = dict(zip(("output", "loss"), map(error_of, ours, theirs), strict=True))
    expected, turned = dict(original.named_parameters()), is_transposed(model)
    for name, p in model.named_parameters():
        gradient = None if p.grad is None else full_tensor(p, p.grad, mesh.tp_group, turned.get(p, False))
        errors[name] = error_of(gradient, expected[name].grad)
    assert max(errors.values()) < 1e-4, {name: f"{e:.1e}" for name, e in errors.items() if not e < 1e-4}
    return sharded, "the same"


def outcomes(rank, world_size, families):
    warnings.simplefilter("ignore")
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    found = {}
    for family in families:
        try:
            found[family] = [outcome(family, mesh, sequence_parallel) for sequence_parallel in (False, True)]
        except Exception as error:
            raise AssertionError(f"{family}: {type(error).__name__}: {error}") from error
    return found


def test_sample():
    first, second = run_on_ranks(outcomes, 2, list(SAMPLE), timeout_s=300)
    assert first == second
    for family, (sharded, in_blocks) in SAMPLE.items():
        assert first[family][0] == (sharded, "the same"), family
        assert in_blocks in first[family][1][1], family


@pytest.mark.slow
def test_all():
    """No family computes wrong numbers, and one that fails says why in a line."""
    first, second = run_on_ranks(outcomes, 2, list(FAMILIES), timeout_s=1500)
    assert first == second
    assert all(plain[1] == "the same" for plain, _ in first.values())
