"""Start here when logits, loss or gradients of a transformers model under context parallelism differ from before."""

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
from fused_megatron.testing import run_cases_on_ranks, run_on_ranks

SMALL = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 61, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def gpt2(**options):
    small = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 61, "n_positions": 64}
    rates = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0} | options
    return hf.GPT2LMHeadModel(hf.GPT2Config(**small, bos_token_id=1, eos_token_id=2, **rates))


def llama(**options):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2, **options))


def mistral():
    return hf.MistralForCausalLM(hf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4))


def qwen3():
    """Norms over single heads."""
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True))


def gemma3():
    """A layer with a window and a layer without."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SMALL, num_key_value_heads=1, head_dim=8, **layers))


def bert():
    """Bidirectional."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, **rates))


def roberta():
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.RobertaForMaskedLM(hf.RobertaConfig(**SMALL, **rates))


def qwen2():
    """A layer without a window before a layer with one."""
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, num_key_value_heads=2, **windows))


def gemma():
    return hf.GemmaForCausalLM(hf.GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8))


def phi3():
    return hf.Phi3ForCausalLM(hf.Phi3Config(**SMALL, num_key_value_heads=2))


def olmo2():
    return hf.Olmo2ForCausalLM(hf.Olmo2Config(**SMALL, num_key_value_heads=2))


def smollm3():
    return hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**SMALL, num_key_value_heads=2))


def neox():
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, hidden_dropout=0.0, attention_dropout=0.0))


def opt():
    small = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
    return hf.OPTForCausalLM(hf.OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0))


MORE = (bert, roberta, qwen2, gemma, phi3, olmo2, smollm3, neox, opt)
BUILDERS = {build.__name__: build for build in (gpt2, llama, mistral, qwen3, gemma3, *MORE)}


def built(family):
    torch.manual_seed(0)
    model = BUILDERS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def batch(kind, seq_len=13):
    """Two samples: plain, padded on the right or left, or packed documents."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (2, seq_len), generator=generator)
    found = {"input_ids": ids, "labels": ids.clone()}
    if kind in ("padded", "left"):
        padding = slice(-3, None) if kind == "padded" else slice(0, 3)
        found["attention_mask"] = torch.ones_like(ids)
        found["attention_mask"][1, padding] = 0
        found["labels"][1, padding] = -100
    if kind == "packed":
        rows = [[*range(5), *range(seq_len - 5)], [*range(2), *range(8), *range(seq_len - 10)]]
        found |= {"position_ids": torch.tensor(rows), "use_cache": False}
    return found


def assert_near(name, a, b, tolerance):
    error = (a - b).abs().max() / b.abs().max().clamp(min=1e-2)
    assert error < tolerance, f"{name}: {error:.1e}"


def check_equal(model, original, mesh, inputs):
    """Compare logits, loss and every gradient."""
    ours, theirs = model(**inputs), original(**inputs)
    real = inputs.get("attention_mask", torch.ones(inputs["input_ids"].shape)) == 1
    assert_near("logits", ours.logits[real], theirs.logits[real], 1e-5)
    assert_near("loss", ours.loss, theirs.loss, 1e-5)
    ours.loss.backward(), theirs.loss.backward()
    transposed, expected = is_transposed(model), dict(original.named_parameters())
    for name, p in model.named_parameters():
        assert_near(name, full_tensor(p, p.grad, mesh.tp_group, transposed[p]), expected[name].grad, 1e-5)
        p.grad = expected[name].grad = None


def family(rank, world_size, name, kinds, method, options):
    warnings.simplefilter("ignore")  # transformers' deprecations
    mesh = fm.init_mesh(context_parallel_size=2, tensor_parallel_size=world_size // 2)
    original = built(name).train()
    model = copy.deepcopy(original)
    if "use_reentrant" in options:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    fm.parallelize(model, mesh, context_parallel_method=method)
    for kind in kinds:
        try:
            check_equal(model, original, mesh, batch(kind))
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from error
    return model.parallel_report.text


CASES = [
    ("llama", ["plain", "padded", "packed"], "ring", {}),
    ("llama", ["packed"], "all_gather", {"use_reentrant": False}),
    ("llama", ["plain"], "ring", {"use_reentrant": True}),
    ("mistral", ["plain", "padded", "packed"], "ring", {}),
    ("qwen3", ["padded", "packed"], "all_to_all", {}),
    ("gpt2", ["plain", "left", "packed"], "ring", {}),
    ("gemma3", ["plain", "packed"], "all_gather", {}),
]


def test_two_ranks():
    for (report, _), case in zip(run_cases_on_ranks(family, 2, CASES), CASES, strict=True):
        assert "sequences divided over 2 ranks: 2 layers of" in report and f"attention by {case[2]}" in report


@pytest.mark.slow
def test_more_families():
    kinds = ["plain", "padded", "left", "packed"]
    encoders = (bert, roberta)
    cases = [(build.__name__, kinds[: 3 if build in encoders else 4], "ring", {}) for build in MORE]
    assert len(run_cases_on_ranks(family, 2, cases)) == len(cases)


def test_tensor_and_context_parallel_ranks():
    """Norms of heads are summed over both axes; GPT-2 has one matrix for query, key and value."""
    cases = [("qwen3", ["packed", "plain"], "ring", {}), ("gpt2", ["padded"], "ring", {"use_reentrant": False})]
    for reports in run_cases_on_ranks(family, 4, cases):
        assert "sharded over 2 ranks" in reports[0] and "divided over 2 ranks" in reports[0]


def saved_bytes(model, inputs):
    """Return the bytes of activations that a forward keeps for backward."""
    found = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            found[x.untyped_storage().data_ptr()] = x, x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(**inputs)
    return sum(size for _, size in found.values())


def calls_of_a_model(rank, world_size):
    """Generate and evaluate without gradients; copy the model; add a module to a layer; calls that are refused."""
    mesh = fm.init_mesh(context_parallel_size=world_size)
    original = built("llama")
    model = fm.parallelize(copy.deepcopy(original), mesh)
    ids = batch("plain", 5)["input_ids"]
    prompt = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **prompt), original.generate(ids, **prompt))
    with torch.no_grad():
        outputs = model(ids[:, :1], output_hidden_states=True)  # fewer tokens than ranks
        assert len(outputs.hidden_states) == 3 and outputs.past_key_values is not None
    assert model(**batch("plain")).past_key_values is None
    twin = copy.deepcopy(model)
    check_equal(twin, original, mesh, batch("plain", 14))
    assert all(parameter.grad is None for parameter in model.parameters())
    for one in (model, original):
        torch.manual_seed(1)
        mlp = one.model.layers[0].mlp
        mlp.act_fn = torch.nn.Sequential(mlp.act_fn, torch.nn.Linear(48, 48))
    check_equal(model, original, mesh, batch("plain"))
    inputs = {"input_ids": torch.ones(1, 64, dtype=torch.int64), "use_cache": False}
    assert saved_bytes(model.model, inputs) < 0.55 * saved_bytes(original.model, inputs)
    one_mask = torch.ones(2, 1, 13, 13, dtype=torch.bool)
    cache = hf.DynamicCache(config=model.config)
    for options, words in [
        ({"attention_mask": one_mask}, r"attention_mask=\[2, 1, 13, 13\] .* must be the model's own"),
        ({"output_hidden_states": True}, "output_hidden_states=True with context parallelism would return"),
        ({"past_key_values": cache}, "takes no cache while gradients are recorded"),
        ({"cu_seq_lens_q": torch.tensor([0, 13, 26])}, r"cannot divide cu_seq_lens_q, \[3\], over the ranks"),
        ({"input_ids": ids[:, :1], "labels": None}, "leaves a rank without tokens"),
    ]:
        with pytest.raises(InputError, match=words):
            model(**batch("plain") | options)
        assert model.config._attn_implementation == "sdpa"
    model.model.layers[1].self_attn.attention_dropout = 0.5
    with pytest.raises(InputError, match="attention dropout of LlamaAttention="):
        model.train()(**batch("plain"))


def refused(rank, world_size):
    """Models that are refused, and stay as they are."""
    mesh = fm.init_mesh(context_parallel_size=world_size)
    experts = hf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
    capped = hf.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8)
    for build, options, words in [
        (lambda: hf.T5ForConditionalGeneration(hf.T5Config(d_model=8, num_layers=1)), {}, "an encoder and a decoder"),
        (lambda: hf.MixtralForCausalLM(experts), {}, "it has experts"),
        (lambda: hf.Gemma2ForCausalLM(capped), {}, "its attention takes softcap"),
        (lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=8, n_head=2)), {}, "does not pass its mask"),
        (lambda: gpt2(resid_pdrop=0.1), {}, r"h.0.attn.resid_dropout has dropout 0.1"),
        (lambda: torch.nn.Linear(4, 4), {}, "no model of transformers"),
        (llama, {"sequence_parallel": True}, "sequence_parallel=True with context_parallel_size above 1"),
        (llama, {"context_parallel_method": "rings"}, "context_parallel_method='rings' must be one of"),
    ]:
        model = build()
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(InputError, match=words) as caught:
            fm.parallelize(model, mesh, **options)
        assert "\n" not in str(caught.value)
        assert kinds == [type(module) for module in model.modules()] and not hasattr(model, "parallel_report")
    torch.manual_seed(rank)
    with pytest.raises(InputError, match="other values on other context-parallel ranks"):
        fm.parallelize(llama(), mesh)
    model = fm.parallelize(built("llama"), mesh)
    with pytest.raises(InputError, match="context-parallel ranks \\[1\\] have other inputs than rank 0"):
        model(torch.full((1, 8), rank + 3))


def shared_weights(rank, world_size):
    """ZeRO stage 3 over the same ranks, packed documents; then autocast."""
    mesh = fm.init_mesh(context_parallel_size=world_size)
    original, model = built("qwen3"), fm.parallelize(built("qwen3"), mesh)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = model(**batch("packed")).loss, original(**batch("packed")).loss
    assert_near("autocast", ours.detach(), theirs.detach(), 1e-4)
    model = fm.shard_data_parallel(model, mesh, zero_stage=3)
    steps = fm.ShardedOptimizer(model, torch.optim.SGD, lr=0.5), torch.optim.SGD(original.parameters(), lr=0.5)
    losses = []
    for one, optimizer in zip((model, original), steps, strict=True):
        for seq_len in (13, 14, 15):
            loss = one(**batch("packed", seq_len)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5) and losses[0] > losses[2] + 0.5


def test_shared_weights_and_autocast():
    run_on_ranks(shared_weights, 2)


def test_calls_of_a_context_parallel_model():
    run_on_ranks(calls_of_a_model, 2)


def test_models_that_are_refused():
    run_on_ranks(refused, 2)
