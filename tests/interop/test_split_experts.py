"""Start here when experts of a parallelized model of transformers differ from the original's, or stay whole."""

import copy
import re

import pytest
import torch
import transformers as hf
import transformers.models.mixtral.modeling_mixtral  # takes seconds: ranks are forked from a process that has it
import transformers.models.olmoe.modeling_olmoe
import transformers.models.qwen2_moe.modeling_qwen2_moe
import transformers.models.qwen3_moe.modeling_qwen3_moe
from torch import nn

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.interop.full_state import is_transposed
from fused_megatron.interop.known_experts import experts_obstacle
from fused_megatron.interop.split_experts import ParallelExperts
from fused_megatron.sharding import full_tensor, parameter_record
from fused_megatron.testing import run_on_ranks

SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 61,
    "intermediate_size": 48,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {**SMALL, "num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True}


def mixtral(**changes):
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL | {"num_local_experts": 4} | changes))


def qwen3_moe(**changes):
    """The first layer is dense."""
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**QWEN | {"head_dim": 8, "mlp_only_layers": [0]} | changes))


def qwen2_moe(**changes):
    """A shared expert with a gate."""
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**QWEN | {"shared_expert_intermediate_size": 28} | changes))


def olmoe(**changes):
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**SMALL | {"num_experts": 4} | changes))


def built(build, **changes):
    """Return a model with random weights, the same on every rank."""
    torch.manual_seed(0)
    model = build(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.add_(0.1 * noise) if parameter.dim() == 1 else parameter.copy_(0.2 * noise)
    return model.train()


def batch(rank):
    """Return token ids of 7 positions, a mask that hides the end of the last row, and labels; other sizes by rank."""
    ids = torch.randint(3, 61, (1 + rank % 2, 7), generator=torch.Generator().manual_seed(rank))
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def split(model):
    """Return the experts that are split."""
    return [module for module in model.modules() if isinstance(module, ParallelExperts)]


def assert_near(name, a, b, tolerance=1e-4):
    assert a.shape == b.shape, name
    error = (a - b).abs().max() / b.abs().max().clamp(min=1e-2)
    assert error < tolerance, f"{name}: {error:.1e}"


def full_gradients(model, mesh):
    """Return the gradients of the sum of all data-parallel ranks' losses, in the shapes of the original model."""
    transposed, found = is_transposed(model), {}
    for name, p in model.named_parameters():
        replicas = mesh["dp"] if parameter_record(p).experts is None else mesh["edp"]
        if replicas.group is not None:
            torch.distributed.all_reduce(p.grad, group=replicas.group)
        found[name] = full_tensor(p, p.grad, mesh.tp_group, transposed.get(p, False))
    return found


def check_model(build, mesh, checkpointing=None, **options):
    """Compare with the original; data-parallel ranks have batches of their own. Return the report's line of experts."""
    original = built(build)
    model = copy.deepcopy(original)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    objects = [id(p) for p in model.parameters()]
    assert fm.parallelize(model, mesh, strict=True) is model
    assert [id(p) for p in model.parameters()] == objects
    state, before = fm.full_state_dict(model), original.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before)
    expected = [original(**batch(rank), **options) for rank in range(mesh.dp_size)]
    sum(one.loss for one in expected).backward()
    result = model(**batch(mesh.dp_rank), **options)
    assert_near("logits", result.logits.detach(), expected[mesh.dp_rank].logits.detach())
    assert_near("loss", result.loss.detach(), expected[mesh.dp_rank].loss.detach())
    result.loss.backward()
    gradients = full_gradients(model, mesh)
    for name, p in original.named_parameters():
        assert_near(name, gradients[name], p.grad)
    return model.parallel_report.experts


AUXILIARY = {"output_router_logits": True}


def over_tp(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=2)
    report = check_model(mixtral, mesh, **AUXILIARY)
    assert report == (
        "2 layers with 4 experts: a rank holds 24 of 48 features of 4 of them, 0.07373 of 0.1475 MB; "
        "results are summed over 2 ranks of tp"
    )
    check_model(qwen3_moe, mesh, checkpointing=False)
    with pytest.raises(InputError, match=r"intermediate size=25 must be divisible by tensor_parallel_size=2"):
        fm.parallelize(built(qwen3_moe, moe_intermediate_size=25), mesh)
    with pytest.raises(InputError, match=r"layers.1.mlp.experts: LoRA on experts.* cannot be split over ranks \(merge"):
        fm.parallelize(adapted(built(mixtral)), mesh)
    # What is not known stays whole, which is right under tp, and strict=True refuses it.
    unknown = built(mixtral)
    for module in unknown.modules():
        module.__dict__["is_transposed"] = True
    with pytest.raises(InputError, match=r"strict=True: \S+experts .* a MixtralExperts has is_transposed=True"):
        fm.parallelize(unknown, mesh, strict=True)
    fm.parallelize(unknown, mesh)
    assert "MixtralExperts has is_transposed=True, where False is known" in unknown.parallel_report.text
    assert not split(unknown) and unknown.parallel_report.sharded


def test_experts_divided_over_tp():
    run_on_ranks(over_tp, 2)


def over_ep(rank, world_size, folder):
    mesh = fm.init_mesh(expert_parallel_size=2)
    report = check_model(mixtral, mesh, checkpointing=False, **AUXILIARY)
    assert report == (
        "2 layers with 4 experts: a rank holds 2 of them, 0.07373 of 0.1475 MB; "
        "tokens move between 2 ranks of ep x 1 of etp"
    )
    for build in (qwen3_moe, olmoe):
        check_model(build, mesh)
    for changes, message in (
        ({"num_local_experts": 5}, r"num_experts=5 must be divisible by expert_parallel_size=2 \(nearest: 4, 6\)"),
        ({}, r"expert_parallel_size=2: the experts \S+ cannot be split: a MixtralExperts has has_bias=True"),
    ):
        model = built(mixtral, **changes)
        model.model.layers[0].mlp.experts.has_bias = not changes
        with pytest.raises(InputError, match=message):
            fm.parallelize(model, mesh)
        assert not split(model)
    with pytest.raises(InputError, match=r"LlamaForCausalLM has no experts"):
        fm.parallelize(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)), mesh)
    saves_and_trains(mesh, rank, folder)


def saves_and_trains(mesh, rank, folder):
    original = built(mixtral)
    model = fm.parallelize(copy.deepcopy(original), mesh)
    with pytest.raises(InputError, match="save_pretrained would write the shards of one rank"):
        model.save_pretrained(folder / "never")
    state = fm.full_state_dict(model, rank0_only=True)
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
    torch.distributed.barrier()
    saved = hf.MixtralForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in original.state_dict().items())
    with torch.device("meta"):
        empty = hf.MixtralForCausalLM(original.config)
    fm.parallelize(empty, mesh)
    fm.load_pretrained_shards(empty, folder)
    assert all(torch.equal(p, q) for p, q in zip(empty.parameters(), model.parameters(), strict=True))
    with pytest.raises(
        InputError, match=r"over ranks \[0, 1\] would take .* expert-parallel ranks \[0, 1\] for copies"
    ):
        nn.parallel.DistributedDataParallel(model)
    assert_trains(fm.shard_data_parallel(model, mesh, zero_stage=2), original, mesh)


def assert_trains(model, original, mesh):
    """Two steps with clipping; the loss is the mean over data-parallel ranks."""
    optimizer = fm.ShardedOptimizer(model, torch.optim.AdamW, lr=1e-2)
    reference = torch.optim.AdamW(original.parameters(), lr=1e-2)
    for _ in range(2):
        model(**batch(mesh.dp_rank)).loss.backward()
        norm = fm.clip_grad_norm_(model, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        sum(original(**batch(rank)).loss / mesh.dp_size for rank in range(mesh.dp_size)).backward()
        expected = nn.utils.clip_grad_norm_(original.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
        assert_near("norm", norm.view(1), expected.view(1))
    for name, value in fm.full_state_dict(model).items():
        assert_near(name, value, original.state_dict()[name], 1e-3)


def test_whole_experts_on_other_ranks(tmp_path):
    run_on_ranks(over_ep, 2, tmp_path)


def over_both(rank, world_size):
    """Ranks of ep are those of tp, or those of dp with shards of each expert on those of tp."""
    check_model(qwen2_moe, fm.init_mesh(tensor_parallel_size=2, expert_parallel_size=2))
    mesh = fm.init_mesh(tensor_parallel_size=2, expert_parallel_size=2, expert_tensor_parallel_size=2)
    report = check_model(mixtral, mesh, checkpointing=True)
    assert "a rank holds 24 of 48 features of 2 of them, 0.03686 of 0.1475 MB" in report


def test_tp_and_ep_together():
    run_on_ranks(over_both, 4)


def generated(rank, world_size):
    """Prompts of other lengths, and one rank that ends its text long before the other."""
    mesh = fm.init_mesh(expert_parallel_size=2)
    original = built(mixtral).eval()
    model = fm.parallelize(copy.deepcopy(original), mesh)
    ids = torch.arange(3, 6 + rank).unsqueeze(0)
    tokens = model.generate(ids, max_new_tokens=2 + 6 * rank, do_sample=False)
    assert torch.equal(tokens, original.generate(ids, max_new_tokens=2 + 6 * rank, do_sample=False))


def test_a_rank_that_has_finished_computes_for_the_others():
    run_on_ranks(generated, 2)


class Adapter(nn.Module):
    """A wrapper of a module, like those of PEFT."""

    def __init__(self, module):
        super().__init__()
        self.base_layer = module

    def forward(self, *args):
        return self.base_layer(*args)


def adapted(model):
    model.model.layers[1].mlp.experts = Adapter(model.model.layers[1].mlp.experts)
    return model


def test_one_rank_keeps_experts_as_they_are():
    model = fm.parallelize(built(mixtral), None)
    assert not split(model)
    assert not model.parallel_report.experts


CHANGES = {
    "other weights": (lambda e: e.register_parameter("bias", nn.Parameter(torch.ones(2))), "has other weights than"),
    "activation": (lambda e: setattr(e, "act_fn", nn.ReLU()), "is not silu"),
    "an adapter": (lambda e: setattr(e, "base_layer", built(mixtral).model.layers[0].mlp.experts), "an adapter"),
    "sizes": (lambda e: setattr(e, "down_proj", nn.Parameter(torch.ones(4, 32, 47))), "is not [E, 2F, H]"),
    "interface": (lambda e: setattr(e, "is_concatenated", False), "is_concatenated=False, where True is known"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_experts_that_are_not_known(change):
    experts = built(mixtral).model.layers[0].mlp.experts
    assert experts_obstacle(experts) == ""
    CHANGES[change][0](experts)
    assert re.search(re.escape(CHANGES[change][1]), experts_obstacle(experts))
