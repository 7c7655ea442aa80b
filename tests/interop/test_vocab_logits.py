"""Start here when a model's own loss from shards of its logits is wrong, or gathers them."""

import copy
import warnings

import pytest
import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it
from torch import nn
from torch.nn import functional as F

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.interop import full_tensor
from fused_megatron.interop.full_state import is_transposed
from fused_megatron.modules import DeferredLogits
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.testing import run_on_ranks

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 61, "intermediate_size": 24}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOKENS, VOCAB = 16, 61


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))


def gemma2():
    """Soft cap, scaled embeddings, tied head."""
    more = {"num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, **more))


def bert():
    """Loss module inside forward, head with a bias."""
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, **NO_DROPOUT))


class SmallLM(nn.Module):
    """A model that is not from transformers; its loss has label smoothing."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB, bias=False)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, input_ids, labels, reduction="mean"):
        logits = self.head(self.tokens(input_ids))
        if reduction == "mean":
            loss = self.loss(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
        else:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction).sum() / 3
        return hf.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


PLANS = {SmallLM: {"tokens": "embedding_rowwise", "head": "colwise_gather_output"}}
MODELS = (llama, gemma2, bert, SmallLM)


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, TOKENS // 2), generator=generator)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)}


def built(make):
    torch.manual_seed(0)
    return make()


def compare_gradients(model, original, tp_group):
    expected, turned = dict(original.named_parameters()), is_transposed(model)
    for name, p in model.named_parameters():
        gradient = full_tensor(p, p.grad, tp_group, turned.get(p, False))
        error = (gradient - expected[name].grad).abs().max() / expected[name].grad.abs().max().clamp(min=1e-2)
        assert error < 1e-4, f"{name}: {error:.1e}"


def check_loss(make, gather, mesh, **arguments):
    original = built(make)
    model = fm.parallelize(copy.deepcopy(original), mesh, PLANS.get(make), gather_logits=gather)
    model(**batch(), **arguments)  # the first call compares the inputs of the ranks
    with record_communication() as ledger:
        ours = model(**batch(), **arguments)
    theirs = original(**batch(), **arguments)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    assert type(ours.logits) is (torch.Tensor if gather else DeferredLogits) and type(ours.loss) is torch.Tensor
    assert gather or not ours.logits.is_computed
    whole = [one for one in ledger.entries if one.kind == "all_gather" and one.elements > TOKENS * 6]
    assert len(whole) == (1 if gather else 0)
    loss, expected = ours.loss, theirs.loss
    if gather:  # two backwards: through the loss and through the logits
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
        upstream = torch.randn(theirs.logits.shape, generator=torch.Generator().manual_seed(2))
        loss, expected = loss + 0.1 * (ours.logits * upstream).sum(), expected + 0.1 * (theirs.logits * upstream).sum()
    else:
        rows = 31
        mine = theirs.logits[..., mesh.tp_rank * rows : (mesh.tp_rank + 1) * rows]
        torch.testing.assert_close(ours.logits[..., : mine.shape[-1]], mine, rtol=1e-4, atol=1e-5)
        assert ours.logits.shape[-1] == rows
    loss.backward()
    expected.backward()
    compare_gradients(model, original, mesh.tp_group)
    model.eval(), original.eval()
    with torch.no_grad():  # without gradients, logits are always gathered
        torch.testing.assert_close(model(**batch()).logits, original(**batch()).logits, rtol=1e-4, atol=1e-5)
    return model


def saved_numbers(model, **arguments):
    """Return the size of the largest tensor saved for backward, and the number of tensors as large as the logits."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model(**batch(), **arguments).loss.backward()
    return max(sizes), sum(size >= TOKENS * VOCAB for size in sizes)


def check_tiles(mesh):
    """gather_logits=False: forward and backward of the model's own loss never have this rank's logits."""
    model = fm.parallelize(built(gemma2), mesh, gather_logits=False)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        out = model(**batch())
        out.loss.backward()
    assert not any(shape[-1:] == (31,) for shape in shapes) and not out.logits.is_computed
    values = out.logits.detach()  # 30.5 columns a rank: the last rank has one of padding
    assert values.shape[-1] == 31 and not values.requires_grad
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="its weight has changed since the model ran"):
        out.logits.argmax(-1)


def losses(rank, world_size):
    warnings.simplefilter("ignore")
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    for make in MODELS:
        for gather in (True, False):
            model = check_loss(make, gather, mesh)
    check_loss(SmallLM, True, mesh, reduction="none")
    check_loss(SmallLM, False, mesh, reduction="sum")
    model = check_loss(llama, False, mesh, num_items_in_batch=7)
    ids = batch()["input_ids"]
    expected = built(llama).eval().generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), expected)
    assert saved_numbers(built(llama))[1] >= 1  # transformers saves a softmax of the full logits
    assert saved_numbers(fm.parallelize(built(llama), mesh, gather_logits=False))[1] == 0
    assert saved_numbers(fm.parallelize(built(llama), mesh))[1] == 0
    half = fm.parallelize(built(llama).bfloat16(), mesh)(**batch()).loss
    exact = built(llama)(**batch()).loss
    assert half.dtype == torch.float32 and abs(half - exact) < 2 * abs(built(llama).bfloat16()(**batch()).loss - exact)
    refusals(mesh)
    check_tiles(mesh)


class Softmax(SmallLM):
    def forward(self, input_ids, labels):
        return self.head(self.tokens(input_ids)).softmax(-1)[..., 0].log().sum()


def refusals(mesh):
    model = fm.parallelize(built(Softmax), mesh, PLANS[SmallLM], gather_logits=False)
    with pytest.raises(InputError, match="gather_logits=False: the model does softmax with its logits"):
        model(**batch())
    gathering = fm.parallelize(built(Softmax), mesh, PLANS[SmallLM])
    torch.testing.assert_close(gathering(**batch()), built(Softmax)(**batch()), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="gather_logits=False: the model has no head in shards"):
        fm.parallelize(built(SmallLM), mesh, {"tokens": "embedding_rowwise"}, gather_logits=False)
    with pytest.raises(InputError, match=r"target\[\d\]=\d+ must be in \[0, 61\)"):
        model = fm.parallelize(built(SmallLM), mesh, PLANS[SmallLM])
        model(batch()["input_ids"], batch()["labels"] + VOCAB)


def test_losses_from_shards():
    run_on_ranks(losses, 2, timeout_s=300)


def compiled(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    original = built(SmallLM)
    model = fm.parallelize(copy.deepcopy(original), mesh, PLANS[SmallLM], gather_logits=False)
    loss = torch.compile(model, backend="eager")(**batch()).loss
    expected = original(**batch()).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    compare_gradients(model, original, mesh.tp_group)


def test_under_torch_compile():
    run_on_ranks(compiled, 2, timeout_s=300)


def padding_only(rank, world_size):
    """Compute a loss over 4 entries on 3 ranks with 2 columns each: the last rank has only padding."""
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(4, 4))
    twin = fm.parallelize(copy.deepcopy(head), mesh, {"0": "colwise_gather_output"})
    twin.register_forward_hook(lambda module, args, y: F.cross_entropy(y, torch.tensor([0, 3, 2])), prepend=True)
    x = torch.randn(3, 4)
    ours, theirs = twin(x), F.cross_entropy(head(x), torch.tensor([0, 3, 2]))
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    compare_gradients(twin, head, mesh.tp_group)


def test_a_rank_with_only_padding():
    run_on_ranks(padding_only, 3, timeout_s=300)
