"""Start here when experts of a parallelized model of transformers differ from the original's, or stay whole."""

import copy

import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it

import fused_megatron as fm
from fused_megatron.interop.experts import experts_of
from fused_megatron.interop.full_state import is_transposed
from fused_megatron.sharding import full_tensor
from fused_megatron.testing import run_on_ranks

SMALL = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 61, "intermediate_size": 48,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN = {**SMALL, "num_experts": 4, "moe_intermediate_size": 24, "num_key_value_heads": 2, "norm_topk_prob": True}


def mixtral(**changes):
    sizes = {**SMALL, "num_local_experts": 4, "num_key_value_heads": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**sizes | changes))


def qwen3_moe(**changes):
    """The first layer is dense."""
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**QWEN | {"head_dim": 8, "mlp_only_layers": [0]} | changes))


def qwen2_moe(**changes):
    """A shared expert with a gate."""
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**QWEN | {"shared_expert_intermediate_size": 28} | changes))


def olmoe(**changes):
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**SMALL | {"num_experts": 4} | changes))


FAMILIES = {build.__name__: build for build in (mixtral, qwen3_moe, qwen2_moe, olmoe)}


def built(family, **changes):
    """Return a model with random weights, the same on every rank."""
    torch.manual_seed(0)
    model = FAMILIES[family](**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.add_(0.1 * noise) if parameter.dim() == 1 else parameter.copy_(0.2 * noise)
    return model.train()


def batch(seed=1, rows=2, seq_len=7):
    """Return token ids, a mask that hides the end of the last row, and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (rows, seq_len), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def full_gradients(model, tp_group):
    transposed, experts = is_transposed(model), experts_of(model)
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        if p in experts:
            module, weight = experts[p]
            found[name] = module.full(weight, p.grad)
        else:
            found[name] = full_tensor(p, p.grad, tp_group, transposed.get(p, False))
    return found


def assert_near(name, a, b, tolerance=1e-4):
    assert a.shape == b.shape, name
    error = (a - b).abs().max() / b.abs().max().clamp(min=1e-2)
    assert error < tolerance, f"{name}: {error:.1e}"


def check_gradients(original, model, mesh, **options):
    """Compare with one process that has the batches of all data-parallel ranks, one after the other."""
    batches = [batch(1 + rank, 1 + rank % 2) for rank in range(mesh.dp_size)]
    expected = [original(**one, **options) for one in batches]
    sum(one.loss for one in expected).backward()
    own = expected[mesh.dp_rank]
    result = model(**batches[mesh.dp_rank], **options)
    assert_near("logits", result.logits.detach(), own.logits.detach())
    assert_near("loss", result.loss.detach(), own.loss.detach())
    result.loss.backward()
    gradients = full_gradients(model, mesh.tp_group)
    experts = {p for p, (module, _) in experts_of(model).items() if module.holds_experts}
    for name, p in model.named_parameters():
        # Ranks have the gradients of their own batches; experts, of the batches of all ranks of ep.
        gradients[name] = summed(gradients[name], mesh["edp" if p in experts else "dp"].group)
    for name, p in original.named_parameters():
        assert_near(name, gradients[name], p.grad)


def summed(tensor, group):
    return tensor if group is None else torch.stack(gathered(tensor, group)).sum(0)


def gathered(tensor, group):
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def check_family(family, sizes, checkpointing=None):
    mesh = fm.init_mesh(**sizes)
    original = built(family)
    model = copy.deepcopy(original)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        if checkpointing:
            model.enable_input_require_grads()
    before = copy.deepcopy(original.state_dict())
    names = [id(p) for p in model.parameters()]
    fm.parallelize(model, mesh, strict=True)
    assert [id(p) for p in model.parameters()] == names
    state = fm.full_state_dict(model)
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before)
    check_gradients(original, model, mesh)
    return str(model.parallel_report)


def families(rank, world_size, sizes, names):
    for name in names:
        print(check_family(name, sizes)) if rank == 0 else check_family(name, sizes)


def test_dev_tp():
    run_on_ranks(families, 2, {"tensor_parallel_size": 2}, list(FAMILIES))


def test_dev_ep():
    run_on_ranks(families, 2, {"expert_parallel_size": 2}, list(FAMILIES))


def test_dev_tp_ep():
    run_on_ranks(families, 4, {"expert_parallel_size": 2, "tensor_parallel_size": 2}, ["mixtral", "qwen2_moe"])


def test_dev_tp_ep_etp():
    s = {"expert_parallel_size": 2, "tensor_parallel_size": 2, "expert_tensor_parallel_size": 2}
    run_on_ranks(families, 4, s, ["mixtral", "qwen3_moe"])
