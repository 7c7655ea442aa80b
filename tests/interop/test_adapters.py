"""Start here when LoRA on a parallel model trains, saves or merges otherwise than on one process."""

import copy

import peft
import pytest
import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.interop import full_tensor
from fused_megatron.interop.full_state import is_transposed
from fused_megatron.testing import run_cases_on_ranks

SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 61,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]


def llama():
    """One key-value head, fewer than ranks; an odd vocabulary."""
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=1, attention_bias=True))


def gpt2():
    """Conv1D with weights [in, out], stacked query, key and value, tied head."""
    small = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 61, "n_positions": 32}
    small |= {"bos_token_id": 1, "eos_token_id": 2}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**small, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))


def neox():
    """Query, key and value alternate head by head."""
    no_dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, **no_dropout))


FAMILIES = {build.__name__: build for build in (llama, gpt2, neox)}
TARGETS = {"llama": PROJECTIONS, "gpt2": CONV1D, "neox": ["query_key_value", "dense", "dense_h_to_4h"]}


def config(family, **options):
    options = {"target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2", **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, **options)


def base(family):
    torch.manual_seed(0)
    return FAMILIES[family]()


def adapted(family, **options):
    """A model with adapters whose B is not 0, and norms and biases that are not 1 and 0."""
    torch.manual_seed(0)
    model = peft.get_peft_model(FAMILIES[family](), config(family, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.train()


def batch(seed=1, rows=2):
    ids = torch.randint(3, 61, (rows, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def assert_near(name, a, b, tolerance=1e-4):
    assert (a is None) == (b is None), name
    if a is not None:
        error = (a - b).abs().max() / b.abs().max().clamp(min=1e-2)
        assert a.shape == b.shape and error < tolerance, f"{name}: {error:.1e}"


def train_step(model, seed):
    """One step of the trainable parameters with a clipped gradient; the same dropout masks for every model."""
    torch.manual_seed(seed)
    loss = model(**batch(seed)).loss + 0.5 * model(**batch(seed + 10)).loss
    loss.backward()
    norm = fm.clip_grad_norm_(model, 0.5)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=0.5).step()
    return loss.detach(), norm


def check_training(model, original, mesh):
    transposed, expected = is_transposed(model), dict(original.named_parameters())
    for seed in (3, 4):
        (loss, norm), (true_loss, true_norm) = train_step(model, seed), train_step(original, seed)
        torch.testing.assert_close(loss, true_loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(norm, true_norm, rtol=1e-4, atol=0)
        for name, p in model.named_parameters():
            gradient = None if p.grad is None else full_tensor(p, p.grad, mesh.tp_group, transposed.get(p, False))
            assert_near(name, gradient, expected[name].grad)
        model.zero_grad(), original.zero_grad()
    state, true_state = fm.full_state_dict(model), original.state_dict()
    assert list(state) == list(true_state)
    for name, value in state.items():
        assert_near(name, value, true_state[name])


def check_answers(model, original):
    model.eval(), original.eval()
    inputs = {"input_ids": batch()["input_ids"][:, :5]}  # a length that the ranks do not divide
    with torch.no_grad():
        assert_near("logits", model(**inputs).logits, original(**inputs).logits, 1e-3)
        prompt = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(**inputs, **prompt), original.generate(**inputs, **prompt))
        with model.disable_adapter(), original.disable_adapter():
            assert_near("without adapters", model(**inputs).logits, original(**inputs).logits, 1e-3)


def check_saved(rank, model, original, family, folder):
    """Saved as PEFT saves it, and read by PEFT alone."""
    with pytest.raises(InputError, match=r"save_pretrained would write the shards of one rank"):
        model.save_pretrained(folder)
    state = fm.full_state_dict(model, rank0_only=True, adapters_only=True)
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
        loaded = peft.PeftModel.from_pretrained(base(family), folder)
        loaded.base_model.model.load_state_dict(
            {n: v for n, v in original.base_model.model.state_dict().items() if "lora_" not in n}, strict=False
        )
        inputs = {"input_ids": batch()["input_ids"]}
        with torch.no_grad():
            assert_near("loaded", loaded.eval()(**inputs).logits, original(**inputs).logits, 1e-3)
    else:
        assert state == {}


def check_merged(model, original):
    merged, true_merged = model.merge_and_unload(), original.merge_and_unload()
    state, true_state = fm.full_state_dict(merged), true_merged.state_dict()
    assert list(state) == list(true_state)
    for name, value in state.items():
        assert_near(name, value, true_state[name], 1e-3)
    with torch.no_grad():
        assert_near("merged", merged(**batch()).logits, true_merged(**batch()).logits, 1e-3)
    with pytest.raises(InputError, match=r"save_pretrained would write the shards of one rank"):
        merged.save_pretrained("nowhere")


def before(rank, world_size, folder, family, sequence_parallel, options):
    """Adapters that were made before parallelize."""
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    original = adapted(family, **options)
    model = copy.deepcopy(original)
    fm.parallelize(model, mesh, sequence_parallel=sequence_parallel)
    report = model.parallel_report
    assert report.sequence_parallel == sequence_parallel
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "lora_" in name}
    if family == "llama" and sequence_parallel:
        for one in (model, original):
            one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check_training(model, original, mesh)
    check_answers(model, original)
    check_saved(rank, model, original, family, f"{folder}/{family}{sequence_parallel}{len(options)}")
    check_merged(model, original)
    return shapes, report.text


def after(rank, world_size, folder, family, sequence_parallel, options):
    """Adapters that are added to a parallel model; ranks with other seeds take the first rank's values."""
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    original, model = base(family), fm.parallelize(base(family), mesh, sequence_parallel=sequence_parallel)
    torch.manual_seed(5)
    original = peft.get_peft_model(original, config(family, **options)).train()
    torch.manual_seed(5 + rank)
    model = fm.add_adapters(model, config(family, **options)).train()
    state, true_state = fm.full_state_dict(model), original.state_dict()
    assert all(torch.allclose(state[name], value, rtol=1e-5) for name, value in true_state.items())
    check_training(model, original, mesh)
    check_answers(model, original)
    folder = f"{folder}/added{family}{sequence_parallel}{len(options)}"
    check_saved(rank, model, original, family, folder)
    torch.distributed.barrier()
    again = fm.add_adapters(fm.parallelize(base(family), mesh), config(family, **options))
    again.load_adapter(folder, "default")
    assert fm.add_adapters(again, config(family), "other") is again
    loaded, saved = (fm.full_state_dict(one, adapters_only=True) for one in (again, model))
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    assert any(".other." in name for name in loaded)
    check_merged(model, original)


FAST = [
    ("llama", False, {"lora_dropout": 0.3}),
    ("llama", True, {"use_dora": True, "lora_dropout": 0.3}),
    ("gpt2", True, {"lora_bias": True}),
    ("llama", False, {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens", "norm"]}),
]
SLOW = [
    ("llama", True, {"lora_dropout": 0.3}),
    ("llama", False, {"use_dora": True, "use_rslora": True}),
    ("gpt2", False, {"use_dora": True}),
    ("gpt2", True, {"use_dora": True, "lora_dropout": 0.2}),
    ("neox", False, {"use_dora": True}),
    ("neox", True, {"lora_dropout": 0.1}),
    ("llama", True, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
]


def test_adapters_that_were_made_before_train_save_and_merge_as_on_one_process(tmp_path):
    results = run_cases_on_ranks(before, 2, [(str(tmp_path), *case) for case in FAST])
    shapes, text = results[0][0]
    layer = "base_model.model.model.layers.0"
    assert shapes[f"{layer}.self_attn.q_proj.lora_A.default.weight"] == (3, 32)
    assert shapes[f"{layer}.self_attn.q_proj.lora_B.default.weight"] == (16, 3)
    assert shapes[f"{layer}.self_attn.k_proj.lora_B.default.weight"] == (8, 3)  # both ranks have the single head
    assert shapes[f"{layer}.mlp.down_proj.lora_A.default.weight"] == (3, 24)
    assert shapes[f"{layer}.mlp.down_proj.lora_B.default.weight"] == (32, 3)
    assert "layers.{0..1}.self_attn.q_proj: Linear -> ColumnLinear\n" in text
    assert "layers.{0..1}.mlp.down_proj.lora_A.default: Linear -> AdapterRow\n" in text
    assert "q_proj.lora_A.default (Linear): whole, the other matrix of its adapter is in shards" in text


@pytest.mark.slow
def test_more_adapters_that_were_made_before(tmp_path):
    assert len(run_cases_on_ranks(before, 2, [(str(tmp_path), *case) for case in SLOW])) == len(SLOW)
    assert run_cases_on_ranks(before, 4, [(str(tmp_path), *FAST[0])])


def test_adapters_that_are_added_to_a_parallel_model(tmp_path):
    cases = [FAST[1], ("gpt2", False, {}), FAST[3]]
    assert len(run_cases_on_ranks(after, 2, [(str(tmp_path), *case) for case in cases])) == 3


@pytest.mark.slow
def test_more_adapters_that_are_added(tmp_path):
    assert run_cases_on_ranks(after, 2, [(str(tmp_path), *case) for case in (FAST[0], FAST[2], *SLOW)])


def over_replicas(rank, world_size, zero_stage):
    """Each data-parallel rank has its rows of the batch; the base weights are frozen and shared, too."""
    mesh = fm.init_mesh(tensor_parallel_size=2)
    original = adapted("llama")
    model = fm.parallelize(copy.deepcopy(original), mesh)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    whole_bytes = sum(p.numel() * p.itemsize for p in frozen)
    fm.shard_data_parallel(model, mesh, zero_stage)
    if zero_stage == 3:
        assert sum(p.untyped_storage().nbytes() for p in frozen) < 0.6 * whole_bytes
    optimizer = fm.ShardedOptimizer(model, torch.optim.AdamW, lr=0.01)
    expected = torch.optim.AdamW([p for p in original.parameters() if p.requires_grad], lr=0.01)
    for seed in (3, 4):
        whole = batch(seed, rows=4)
        model(**{name: x.chunk(mesh.dp_size)[mesh.dp_rank] for name, x in whole.items()}).loss.backward()
        original(**whole).loss.backward()
        norm, true_norm = fm.clip_grad_norm_(model, 0.5), fm.clip_grad_norm_(original, 0.5)
        torch.testing.assert_close(norm, true_norm, rtol=1e-4, atol=0)
        for one in (optimizer, expected):
            one.step(), one.zero_grad()
    true_state = original.state_dict()
    for name, value in fm.full_state_dict(model).items():
        assert_near(name, value, true_state[name], 1e-3)


def test_adapters_with_frozen_weights_over_replicas():
    run_cases_on_ranks(over_replicas, 4, [(1,), (2,), (3,)])


def build(mesh):
    model = adapted("llama", lora_dropout=0.1)
    return model if mesh is None else fm.parallelize(model, mesh, sequence_parallel=True)


def test_verify_finds_no_difference():
    result = fm.verify(build, {"tp": 2}, batch())
    assert result, result.table()


def refused(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    with pytest.raises(InputError, match=r"model is not parallel \(call peft.get_peft_model, then parallelize\)"):
        fm.add_adapters(base("llama"), config("llama"))
    model = fm.parallelize(base("llama"), mesh)
    with pytest.raises(InputError, match=r"init_lora_weights='pissa' needs whole weights: make the adapter before"):
        fm.add_adapters(model, config("llama", init_lora_weights="pissa"))
    # Such values are right if they are made before.
    original = peft.get_peft_model(base("llama"), config("llama", init_lora_weights="pissa"))
    model = fm.parallelize(copy.deepcopy(original), mesh, strict=True)
    assert_near("pissa", model(**batch()).logits, original(**batch()).logits)

    reasons = {}
    for what, options in {
        "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
        "variant": {"target_modules": ["q_proj"], "alora_invocation_tokens": [5]},
        "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    }.items():
        original = adapted("llama", **options)
        model = fm.parallelize(copy.deepcopy(original), mesh)
        reasons[what] = model.parallel_report.text
        assert_near(what, model(**batch()).logits, original(**batch()).logits)
    merged = adapted("llama")
    merged.merge_adapter()
    with pytest.raises(InputError, match=r"strict=True: .*its adapters are merged into it \(unmerge them first"):
        fm.parallelize(merged, mesh, strict=True)

    # The loss of a head with an adapter is computed from shards, which are never gathered.
    original = adapted("llama", target_modules=["lm_head"])
    model = fm.parallelize(copy.deepcopy(original), mesh, gather_logits=False)
    ours, theirs = model(**batch()), original(**batch())
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert ours.logits.shape[-1] == 31
    return reasons


def test_adapters_that_stay_whole_say_why():
    reasons, _ = run_cases_on_ranks(refused, 2, [()])[0]
    whole = "embed_tokens.base_layer (Embedding): an adapter of an embedding keeps it whole (merge it first"
    assert whole in reasons["embedding"]
    assert "a LoRA of the kind ALoraLinearVariant cannot be sharded (merge it first" in reasons["variant"]
    assert "lm_head.base_layer (Linear): DoRA needs the whole output of its layer" in reasons["dora"]
