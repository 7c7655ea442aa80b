"""Start here when cross_entropy gives a wrong loss or gradient on any kind of kernel."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fused_megatron as fm
from fused_megatron.testing.tolerances import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")
# Odd, unaligned, one column, a block of the CPU kernel (a tile of the GPU's) and its neighbours, several and a rest.
VOCAB_SIZES = [1, 37, 1023, 1024, 1025, 4103]
EVERYTHING: dict[str, Any] = {"label_smoothing": 0.3, "z_loss": 1e-2, "softcap": 5.0}
FORMS: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1}, EVERYTHING]


def inputs(num_rows, vocab_size, dtype, device="cpu"):
    """Return logits, targets (some ignored), and an upstream gradient for each token."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(num_rows, vocab_size, generator=generator) * 3).to(dtype)
    target = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    target[::5] = -100
    upstream = torch.randn(num_rows, generator=generator).to(dtype)
    return logits.to(device), target.to(device), upstream.to(device)


def torch_loss(logits, target, reduction="none", label_smoothing=0.0, z_loss=0.0, softcap=None, vocab_size=None):
    """The same loss in plain torch."""
    x = logits[:, :vocab_size]
    x = x if softcap is None else softcap * (x / softcap).tanh()
    loss = F.cross_entropy(x, target, reduction=reduction, label_smoothing=label_smoothing)
    return loss + (z_loss * x.logsumexp(1).square()).masked_fill(target == -100, 0.0) if z_loss else loss


def run(loss_of, logits, target, upstream, **form):
    """Return (loss, gradient)."""
    x = logits.detach().requires_grad_()
    loss = loss_of(x, target, reduction="none", **form)
    return loss.detach(), torch.autograd.grad(loss, x, upstream.to(loss.dtype))[0]


def check_against_float64(logits, target, upstream, **form):
    actual = run(fm.ops.cross_entropy, logits, target, upstream, **form)
    yardstick = run(torch_loss, logits, target, upstream, **form)
    exact = run(torch_loss, logits.double(), target, upstream.double(), **form)
    for name, ours, right, theirs in zip(("loss", "gradient"), actual, exact, yardstick, strict=True):
        assert ours.dtype == logits.dtype
        # Two float32 roundings of the largest logit more, for values that torch happens to get exactly right.
        assert_close_to_reference(ours, right, theirs.double() + 1e-6, name=name)
    assert not actual[0][target == -100].any() and not actual[1][target == -100].any()
    return actual


@pytest.mark.parametrize("form", FORMS, ids=["plain", "smoothing", "everything"])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradient(dtype, vocab_size, form, device):
    check_against_float64(*inputs(3, vocab_size, dtype, device), **form)


@pytest.mark.parametrize("vocab_size", [1, 1000, 2048, 2050])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_vocabulary(dtype, vocab_size, device):
    form = EVERYTHING
    logits, target, upstream = inputs(3, 2051, dtype, device)
    target = torch.where(target == -100, target, target % vocab_size)
    logits[:, vocab_size:] = NAN  # they must have no effect
    actual = run(fm.ops.cross_entropy, logits, target, upstream, vocab_size=vocab_size, **form)
    alone = run(fm.ops.cross_entropy, logits[:, :vocab_size].contiguous(), target, upstream, **form)
    for name, ours, right in zip(("loss", "gradient"), actual, alone, strict=True):
        ours = ours[:, :vocab_size] if name == "gradient" else ours
        assert_close_to_reference(ours, right.double(), right.double() + 1e-6, name=name)
    assert not actual[1][:, vocab_size:].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(37,), (5, 37), (5, 37, 3), (2, 37, 3, 4)], ids=str)
def test_layouts_and_reductions(shape, reduction, device):
    torch.manual_seed(0)
    logits = torch.randn(shape).to(device).requires_grad_()
    target = torch.randint(0, 37, shape[:1] * (len(shape) > 1) + shape[2:]).to(device)
    if target.dim():
        target.view(-1)[1] = -100
    ours = fm.ops.cross_entropy(logits, target, reduction=reduction)
    torchs = F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(ours)
    gradients = [torch.autograd.grad(loss, logits, upstream)[0] for loss in (ours, torchs)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


# Columns, elements from one row to the next, and where the first row begins: rows at 16-byte boundaries that are no
# multiple of 16 elements apart; rows that begin anywhere, with gradients (which are dense) at the same or other places;
# memory that begins anywhere.
@pytest.mark.parametrize(
    ("columns", "stride", "skip"),
    [(2056, 2056, 0), (4101, 4101, 0), (2048, 2056, 8), (2047, 2056, 0), (5, 13, 16), (2300, 2311, 0), (2100, 2100, 3)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_anywhere(dtype, columns, stride, skip, device):
    logits, target, upstream = inputs(3, columns, dtype, device)
    buffer = torch.full((skip + 3 * stride,), NAN, dtype=dtype, device=device)  # a stray read would show
    placed = buffer[skip:].view(3, stride)[:, :columns].copy_(logits)
    check_against_float64(placed, target, upstream, **EVERYTHING)
    assert torch.equal(placed, logits)


@pytest.mark.parametrize("view", ["every other row", "transposed", "expanded"])
def test_not_contiguous(view, device):
    torch.manual_seed(0)
    base = torch.randn(8, 400).to(device)
    views = {"every other row": base[::2, 5:105], "transposed": base.t()[:9], "expanded": base[:1].expand(7, 400)}
    logits = views[view]
    target = torch.randint(0, logits.shape[1], logits.shape[:1]).to(device)
    upstream = torch.randn(2 * len(logits)).to(device)[::2]
    check_against_float64(logits, target, upstream, **EVERYTHING)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_split_over_programs(dtype, device, monkeypatch):
    """A GPU splits rows like this if there are few."""
    kernels = pytest.importorskip("fused_megatron.kernels.cross_entropy")
    assert kernels._num_splits(8192, 64, 132) == 1
    assert kernels._num_splits(1, 64, 132) == 64  # never more programs than tiles
    assert kernels._num_splits(100, 64, 132) == 6
    assert kernels._num_splits(4, 0, 132) == 1  # only padding
    assert kernels._num_splits(8, 75, 132) == 38  # two tiles each, and none without a tile
    monkeypatch.setattr(kernels, "_num_splits", lambda *_: 3)
    check_against_float64(*inputs(3, 7001, dtype, device), **EVERYTHING)
    check_against_float64(*inputs(2, 5, dtype, device), **EVERYTHING)  # splits without a tile


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_rows", [0, 3])
def test_nothing_to_learn(num_rows, reduction, device):
    """An empty batch, and a batch of only ignored tokens, whose logits are all NaN."""
    logits = torch.full((num_rows, 7), NAN, device=device, requires_grad=True)
    target = torch.full((num_rows,), -100, device=device)
    loss = fm.ops.cross_entropy(logits, target, reduction=reduction)
    expected = F.cross_entropy(logits.detach().nan_to_num(), target, reduction=reduction)
    torch.testing.assert_close(loss.detach(), expected, equal_nan=True)
    loss.sum().backward()
    assert logits.grad is not None and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("column", [0, 2500])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e4, -1e4])
@pytest.mark.parametrize("form", [FORMS[1], {"softcap": 30.0}], ids=str)
def test_extreme_logits(value, column, form, device):
    torch.manual_seed(0)
    logits = torch.randn(2, 3000)
    logits[:, column] = value
    logits, target, upstream = (x.to(device) for x in (logits, torch.tensor([column, 77]), torch.randn(2)))
    ours = run(fm.ops.cross_entropy, logits, target, upstream, **form)
    exact = run(torch_loss, logits.double(), target, upstream.double(), **form)
    for our, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(our.double(), right, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_derivative_of_the_cap_does_not_cancel(device):
    """For large |x| it is 4 exp(-2 |x| / c), where 1 - tanh^2 in float32 is 0."""
    logits = torch.tensor([[0.0, 1.0, 20.0, -20.0, 45.0, -80.0]], device=device)
    target, upstream = torch.tensor([4], device=device), torch.tensor([1.0], device=device)
    (_, ours), (_, exact) = (
        run(loss_of, x, target, upstream.to(x.dtype), softcap=5.0)
        for loss_of, x in ((fm.ops.cross_entropy, logits), (torch_loss, logits.double()))
    )
    torch.testing.assert_close(ours.double()[:, :5], exact[:, :5], rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_grow_along_the_row(dtype, device):
    """Every block of logits is far above all earlier blocks, and the last blocks are only -inf."""
    logits = torch.linspace(-1e4, 1e4, 4500).repeat(2, 1).to(dtype)
    logits[1] = logits[1].flip(0)
    logits[:, -1500:] = -INF
    target, upstream = torch.tensor([2900, 10]).to(device), torch.tensor([2.0, -3.0]).to(device)
    ours = run(fm.ops.cross_entropy, logits.float().to(device), target, upstream)
    exact = run(torch_loss, logits.double().to(device), target, upstream.double())
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", [{}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "z_loss": 1e-9}], ids=str)
@pytest.mark.parametrize("common", [0.0, 1e4, 1e5, -1e6])
def test_an_offset_of_all_logits_costs_no_precision(common, form, device):
    logits, target, upstream = inputs(3, 4103, torch.float32, device)
    target[0] = 4102
    logits[0, :4000] = -INF if "label_smoothing" not in form else 0.0  # blocks without a finite logit
    logits += common
    ours = run(fm.ops.cross_entropy, logits, target, upstream, **form)
    exact = run(torch_loss, logits.double(), target, upstream.double(), **form)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_logits_minus_infinity(dtype, device):
    logits = torch.full((1, 9), -INF, dtype=dtype, device=device)
    assert fm.ops.cross_entropy(logits, torch.tensor([3], device=device)).isnan()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("common", [0.0, 2.0**20])
@pytest.mark.parametrize(("num_shards", "columns"), [(3, 1024), (3, 701), (4, 1025)])
def test_shards_equal_the_whole(num_shards, columns, common, dtype, device):
    """With padding within a shard, and shards of only padding; the padding is NaN, so that a read would show."""
    vocab_size = 2050
    logits, target, upstream = inputs(3, vocab_size, dtype, device)
    if common and dtype != torch.float16:
        logits += common
    bounds = [shard * columns for shard in range(num_shards + 1)]
    padded = F.pad(logits, (0, bounds[-1] - vocab_size), value=NAN)
    form = {"label_smoothing": 0.1, "softcap": None if common else 5.0, "z_loss": 0.0 if common else 1e-3}
    shards = [
        (padded[:, start:end], fm.ops.LossTerms(vocab_size, start, **form)) for start, end in itertools.pairwise(bounds)
    ]
    stats = torch.stack([fm.ops.cross_entropy_statistics(x, target, terms) for x, terms in shards])
    loss, lse = fm.ops.cross_entropy_merge(stats, target, shards[0][1], num_columns=columns)
    gradients = [fm.ops.cross_entropy_gradient(upstream, x, target, lse, terms) for x, terms in shards]
    gradient = torch.cat(gradients, dim=1)
    exact = run(torch_loss, logits.double(), target, upstream.double(), **form)
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=1e-6)
    assert_close_to_reference(gradient[:, :vocab_size], exact[1], name="gradient")
    assert not gradient[:, vocab_size:].any()
    before = padded.clone()
    for (x, terms), expected in zip(shards, gradients, strict=True):
        result = fm.ops.cross_entropy_gradient_(upstream, x, target, lse, terms)
        assert result is x and torch.equal(x, expected)  # x lies between other shards, which must not change
    assert torch.equal(padded, gradient) and not torch.equal(padded, before)


def test_many_shards_merge(device):
    torch.manual_seed(0)
    stats = torch.randn(5, 200, 3) * 10
    stats[4] = torch.tensor([0.0, -INF, 0.0])  # shard 4 is padding; shard 3 has 2 entries and 2 columns of padding
    target = torch.randint(0, 14, (200,))
    target[::7] = -100
    terms = fm.ops.LossTerms(14, label_smoothing=0.3, z_loss=1e-2)
    loss, lse = fm.ops.cross_entropy_merge(stats.to(device), target.to(device), terms, num_columns=4)
    shift, log_sum, linear = stats.double().unbind(2)
    entries = torch.tensor([4.0, 4.0, 4.0, 2.0, 0.0], dtype=torch.float64)
    share = 0.7 * (target // 4 == torch.arange(5)[:, None]) + 0.3 / 14 * entries[:, None]
    exact_lse = (shift + log_sum).logsumexp(0)
    exact = exact_lse + (linear - share * shift).sum(0) + 1e-2 * exact_lse.square()
    assert_close_to_reference(lse.sum(1), exact_lse, name="lse")
    assert_close_to_reference(loss, exact.masked_fill(target == -100, 0.0), name="loss")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_in_place(dtype, device):
    logits, target, upstream = inputs(3, 2051, dtype, device)
    expected = run(fm.ops.cross_entropy, logits, target, upstream, **EVERYTHING)
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1
    loss = fm.ops.cross_entropy(hidden, target, reduction="none", inplace_backward=True, **EVERYTHING)
    other = hidden.square().sum()  # needs these logits too
    memory, version = hidden.data_ptr(), hidden._version
    (gradient,) = torch.autograd.grad(loss, hidden, upstream.to(loss.dtype), retain_graph=True)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])
    assert gradient.data_ptr() == memory and hidden._version == version + 1 and not gradient.requires_grad
    for stale in (loss.sum(), other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(stale, hidden)


@pytest.mark.parametrize("view", ["transposed", "expanded", "images"])
def test_backward_in_place_does_not_change_other_memory(view, device):
    torch.manual_seed(0)
    base = torch.randn(9, 30).to(device)
    logits = {"transposed": base.t(), "expanded": base[:1].expand(7, 30), "images": base.view(3, 30, 3)}[view]
    target = torch.randint(0, logits.shape[1], (logits.shape[0], *logits.shape[2:])).to(device)
    x = logits.detach().requires_grad_()
    gradients = [
        torch.autograd.grad(fm.ops.cross_entropy(x, target, inplace_backward=inplace), x)[0]
        for inplace in (False, True)
    ]
    assert torch.equal(*gradients) and torch.equal(x, logits)


def test_invalid_target_gives_nan_where_it_is_not_checked(device):
    logits, target, upstream = inputs(4, 40, torch.float32, device)
    target[1], target[2] = 40, -1
    loss, gradient = run(fm.ops.cross_entropy, logits, target, upstream, check_target=False)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert gradient.isnan().all(dim=1).tolist() == gradient.isnan().any(dim=1).tolist() == loss.isnan().tolist()
    stats = fm.ops.cross_entropy_statistics(logits, target, fm.ops.LossTerms(40, 40), check_target=False)
    assert stats[:, 2].isnan().tolist() == loss.isnan().tolist()  # also for a shard of only padding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_twice(dtype, device):
    arguments = inputs(3, 5003, dtype, device)
    first, second = (run(fm.ops.cross_entropy, *arguments, **EVERYTHING) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
