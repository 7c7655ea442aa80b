"""Start here when the loss of a model with a fused head is wrong, or its logits, or takes as much memory as before."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_megatron.modules import DeferredLogits, FusedHead, replace_modules

BATCH, SEQUENCE, WIDTH, VOCAB = 2, 6, 8, 37


class LM(nn.Module):
    """An embedding and a head; `after` is what the model does to its logits."""

    def __init__(self, bias=False, after=lambda logits: logits, tied=False):
        super().__init__()
        self.tokens, self.mix = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=bias)
        if tied:
            self.head.weight = self.tokens.weight
        self.after = after

    def forward(self, ids):
        return self.after(self.head(torch.tanh(self.mix(self.tokens(ids)))))


def both(dtype=torch.float32, **options):
    """Return a replaced model and its twin."""
    torch.manual_seed(0)
    twin = LM(**options).to(dtype)
    model = copy.deepcopy(twin)
    report = replace_modules(model)
    assert [(one.name, one.was, one.now) for one in report.replaced] == [("head", "Linear", "FusedHead")]
    return model, twin


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=generator)
    return ids, ids.roll(-1, 1).masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)


def shifted(logits, labels, **options):
    """The loss of older models of transformers."""
    logits = logits.float()[..., :-1, :].contiguous().view(-1, VOCAB)
    return F.cross_entropy(logits, labels[..., 1:].reshape(-1), **options)


def over_items(logits, labels):
    return F.cross_entropy(logits.float().view(-1, VOCAB), labels.view(-1), reduction="sum") / 7


LOSSES = {
    "shifted": shifted,
    "over items": over_items,
    "per token": lambda x, y: (shifted(x, y, reduction="none") * torch.linspace(-1, 2, 10)).sum(),
    "smoothed": lambda x, y: shifted(x, y, label_smoothing=0.1),
    "ignored": lambda x, y: shifted(x, y, ignore_index=3) if y.masked_fill_(y == -100, 3) is not None else None,
    "module": lambda x, y: nn.CrossEntropyLoss()(x[:, 2:].flatten(0, 1), y[:, 2:].flatten()),
}
CHANGES = {
    "none": lambda x: x,
    "soft cap": lambda x: torch.tanh(x / 2.5) * 2.5,
    "scale": lambda x: x * 0.125,
    "scaled soft cap": lambda x: 3 * torch.tanh(x.float() * 0.4),
}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients(dtype, loss, change):
    model, twin = both(dtype, after=CHANGES[change], bias=change == "none", tied=change == "scale")
    exact = copy.deepcopy(twin).double()
    ids, labels = batch()
    logits = model(ids)
    losses = [LOSSES[loss](one, labels.clone()) for one in (logits, twin(ids), exact(ids))]
    assert not logits.is_computed and losses[0].dtype == losses[1].dtype and type(losses[0]) is torch.Tensor
    ours, theirs, true = (gradients(m, x) for m, x in zip((model, twin, exact), losses, strict=True))
    for a, b, c in zip([losses[0], *ours], [losses[1], *theirs], [losses[2], *true], strict=True):
        assert a.dtype == b.dtype
        # A loss is one number, whose rounding may happen to be small: it counts with the dtype's.
        slack = (1e-6 if dtype == torch.float32 else 4e-3) * c.double().norm()
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + slack


def test_no_tensor_has_the_size_of_the_logits():
    model, _ = both()
    ids, labels = batch()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        logits = model(ids)
        shifted(logits, labels).backward()
    assert max(sizes) < BATCH * SEQUENCE * VOCAB and not logits.is_computed


READS = {
    "values": lambda x: x + 0,
    "argmax": lambda x: x.argmax(-1),
    "softmax": lambda x: x.float().log_softmax(-1),
    "in torch.cat": lambda x: torch.cat([x, x], -1),
    "columns": lambda x: x[..., :5],
    "a mask": lambda x: x[x > 0],
    "class weights": lambda x: F.cross_entropy(x[0], torch.arange(SEQUENCE), weight=torch.linspace(0, 1, VOCAB)),
    "probabilities": lambda x: F.cross_entropy(x[0], torch.full((SEQUENCE, VOCAB), 1 / VOCAB)),
    "columns in dim 1": lambda x: F.cross_entropy(x.transpose(1, 2), batch()[1]),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy().copy()),
    "a view": lambda x: x.view(BATCH, -1)[:, ::2],
    "a list": lambda x: torch.tensor(x.tolist()),
    "negative scale": lambda x: F.cross_entropy((-x)[0], torch.arange(SEQUENCE)),
}


@pytest.mark.parametrize("read", READS)
def test_logits_are_there_for_whoever_reads_them(read):
    model, twin = both(bias=True)
    ids, _ = batch()
    ours, theirs = READS[read](model(ids)), READS[read](twin(ids))
    assert type(ours) is type(theirs) and ours.requires_grad == theirs.requires_grad
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if theirs.requires_grad:
        dy = torch.randn(theirs.shape)
        for a, b in zip(gradients(model, (ours * dy).sum()), gradients(twin, (theirs * dy).sum()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_known_without_the_values():
    model, twin = both()
    ids, _ = batch()
    logits, expected = model(ids), twin(ids)
    for one in (lambda x: x.shape, lambda x: x.dtype, lambda x: x.device, lambda x: x.size(-1), lambda x: x.dim()):
        assert one(logits) == one(expected)
    assert logits.requires_grad and len(logits) == len(expected) and not logits.is_computed
    assert isinstance(logits, torch.Tensor) and repr(logits)[:10] == repr(expected)[:10]


def test_read_without_and_with_gradients():
    model, twin = both()
    ids, labels = batch()
    logits, expected = model(ids), twin(ids)
    with torch.no_grad():
        accuracy = logits.argmax(-1)
    assert torch.equal(accuracy, expected.argmax(-1))
    losses = [(shifted(x, labels) + (x * x).mean()) for x in (logits, expected)]
    for a, b in zip(gradients(model, losses[0]), gradients(twin, losses[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_hook_gets_the_gradient_of_logits_that_are_read():
    model, twin = both()
    ids, labels = batch()
    found = []
    for one, read in ((model, True), (twin, True), (model, False)):
        logits, got = one(ids), []
        logits.register_hook(got.append)
        removed = logits.register_hook(lambda dy: 1 / 0)
        removed.remove()
        (shifted(logits, labels) + (logits.sum() if read else 0)).backward()
        found.append(got)
    assert len(found[0]) == 1 and not found[2]
    torch.testing.assert_close(found[0][0], torch.ones_like(found[0][0]))  # the loss runs on tiles


def test_a_write_into_the_logits_counts():
    model, twin = both()
    ids, labels = batch()
    losses = []
    for one in (model, twin):
        logits = one(ids)
        logits[..., 5] = -30.0
        losses.append(shifted(logits, labels))
    for a, b in zip(gradients(model, losses[0]), gradients(twin, losses[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_logits_of_older_weights_are_an_error():
    model, _ = both()
    ids, labels = batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    logits = model(ids)
    shifted(logits, labels).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"its weight has changed .* \(read them before optimizer.step\(\)"):
        logits.argmax(-1)


def test_plain_without_gradients_with_hooks_and_under_autocast():
    model, twin = both()
    ids, labels = batch()
    with torch.no_grad():
        assert type(model(ids)) is torch.Tensor and torch.equal(model(ids), twin(ids))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(ids), twin(ids)
    assert isinstance(ours, DeferredLogits) and ours.dtype == theirs.dtype == torch.bfloat16
    # Outside of autocast now: the head's own settings count.
    torch.testing.assert_close(shifted(ours, labels), shifted(theirs, labels), rtol=0.01, atol=0.01)
    assert torch.equal(ours.plain, theirs)
    model.head.register_forward_hook(lambda module, args, result: None)
    assert type(model(ids)) is torch.Tensor


def test_compiled_has_whole_logits():
    model, twin = both()
    ids, labels = batch()
    step = torch.compile(lambda ids, labels: shifted(model(ids), labels), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(ids, labels), shifted(twin(ids), labels))


def test_a_hidden_state_of_another_dtype_fails_as_before():
    model, _ = both()
    with pytest.raises(RuntimeError, match="same dtype"):
        model.head(torch.randn(2, 3, WIDTH).double())


class Owner(nn.Module):
    """A model with a loss_function, as in transformers."""

    def __init__(self, loss_function):
        super().__init__()
        self.lm, self.loss_function = LM(), loss_function


def causal(logits, labels, vocab_size):
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
    return F.cross_entropy(logits.float().view(-1, vocab_size), labels.reshape(-1))


def with_entropy(logits, labels, vocab_size):
    return causal(logits, labels, vocab_size) + 0.1 * logits.softmax(-1).square().mean()


def broken(logits, labels, vocab_size):
    raise KeyError("items")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (causal, None),
        (with_entropy, "with_entropy does more with the logits than F.cross_entropy"),
        (broken, "broken could not be tried: KeyError: 'items'"),
    ],
)
def test_report_says_whether_the_models_own_loss_is_fused(function, reason):
    report = replace_modules(Owner(function))
    assert [one.now for one in report.replaced] == ["FusedHead"]
    assert (reason is None) == (not report.left)
    if reason is not None:
        assert report.left[0].name == "loss_function" and reason in report.left[0].reason


def test_which_linear_is_the_head():
    assert not replace_modules(nn.Sequential(nn.Linear(4, 8))).replaced
    two = nn.Sequential(nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB), nn.Linear(4, VOCAB))
    (left,) = replace_modules(two).left
    assert "2 linears have as many outputs as the vocabulary has entries, 37" in left.reason
    assert not any(isinstance(module, FusedHead) for module in two)
